"""All sessions: the open ones, and for a while the ids of those that have ended."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

from services.common.errors import SessionClosedError
from services.scheduler.domain import Phase
from services.scheduler.session import Session, Signal, Transition, closed_error
from services.scheduler.timers import Timers

# A session of which nothing counts against it now is looked at again after this share of the time.
_LOOK_AGAIN = 0.1


class _Closed(NamedTuple):
    """An ended session."""

    at_s: float
    expired: bool


class SessionStore:
    """Sessions by id, counted by phase.

    Args:
        closed_kept: Ended sessions remembered at most.
        closed_ttl_s: How long an ended session is remembered at most.
        session_ttl_s: How long an open session lasts without a sign of its client; 0: for ever.
        start_s: When this scheduler started: what happened before it has not heard.

    Attributes:
        expired: How many sessions were ended because they lasted longer.
    """

    def __init__(
        self,
        closed_kept: int,
        closed_ttl_s: float,
        session_ttl_s: float = 0.0,
        start_s: float = 0.0,
    ) -> None:
        self.expired = 0
        self._sessions: dict[str, Session] = {}
        self._counts = dict.fromkeys(Phase, 0)
        self._tenants: dict[str, int] = {}
        self._closed: OrderedDict[str, _Closed] = OrderedDict()
        self._closed_kept = closed_kept
        self._closed_ttl_s = closed_ttl_s
        self._session_ttl_s = session_ttl_s
        self._start_s = start_s
        # When to look whether a session has expired: once a lifetime, not at each signal.
        self._looks = Timers()

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        return iter(self._sessions.values())

    def get(self, session_id: str) -> Session | None:
        """Returns an open session; None if there is none of that id."""
        return self._sessions.get(session_id)

    def count(self, phase: Phase) -> int:
        """Returns how many open sessions are in a phase."""
        return self._counts[phase]

    def count_tenant(self, tenant_id: str) -> int:
        """Returns how many open sessions a tenant has."""
        return self._tenants.get(tenant_id, 0)

    def add(self, session: Session) -> None:
        """Takes in a session whose id is new."""
        self._sessions[session.session_id] = session
        self._counts[session.phase] += 1
        self._tenants[session.tenant_id] = self._tenants.get(session.tenant_id, 0) + 1
        if self._session_ttl_s:
            heard_s = max(session.heard_s, self._start_s)
            self._looks.set(session.session_id, heard_s + self._session_ttl_s)

    def apply(self, session: Session, signal: Signal, now_s: float) -> Transition:
        """Applies a signal to a session of the store; see `Session.apply`."""
        before = session.phase
        transition = session.apply(signal, now_s)
        self.recount(session, before)
        return transition

    def recount(self, session: Session, before: Phase) -> None:
        """Counts a session whose phase was `before` in its phase of now."""
        self._counts[before] -= 1
        self._counts[session.phase] += 1

    def expire_s(self, session: Session) -> float | None:
        """Returns when a session ends unless something is heard of it before; None: not now."""
        since_s = session.silent_since_s()
        if not self._session_ttl_s or since_s is None:
            return None
        return max(since_s, self._start_s) + self._session_ttl_s

    def take_expired(self, now_s: float) -> Iterator[Session]:
        """Yields the sessions whose time is up; the caller closes each before it goes on."""
        for session_id in self._looks.take_due(now_s):
            session = self._sessions.get(session_id)
            if session is None:
                continue
            expire_s = self.expire_s(session)
            if expire_s is None:
                self._looks.set(session_id, now_s + self._session_ttl_s * _LOOK_AGAIN)
            elif expire_s > now_s:
                self._looks.set(session_id, expire_s)
            else:
                yield session

    def close(self, session_id: str, now_s: float, *, expired: bool = False) -> Session | None:
        """Ends a session, and remembers that it has ended, also if it was not known.

        Args:
            session_id: The session.
            now_s: The time.
            expired: Nobody closed it, it has lasted too long.

        Returns:
            The session that was open; None if none was.
        """
        session = self._sessions.pop(session_id, None)
        if session is not None:
            self._counts[session.phase] -= 1
            self._tenants[session.tenant_id] -= 1
            if not self._tenants[session.tenant_id]:
                del self._tenants[session.tenant_id]
            session.close(now_s)
            self.expired += expired
        self._looks.cancel(session_id)
        if session_id not in self._closed:
            self._closed[session_id] = _Closed(now_s, expired)
        if len(self._closed) > self._closed_kept:
            self._closed.popitem(last=False)
        return session

    def is_closed(self, session_id: str) -> bool:
        """Whether a session of this id is remembered to have ended."""
        return session_id in self._closed

    def closed_error(self, session_id: str) -> SessionClosedError:
        """Returns the error for a session that is remembered to have ended; says if it expired."""
        closed = self._closed.get(session_id)
        expired = closed is not None and closed.expired
        return closed_error(session_id, self._session_ttl_s if expired else None)

    def forget_closed(self, now_s: float) -> None:
        """Forgets the sessions that ended too long ago."""
        while self._closed:
            session_id, closed = next(iter(self._closed.items()))
            if closed.at_s + self._closed_ttl_s > now_s:
                return
            del self._closed[session_id]

    def page(
        self, after: str, size: int, tenant_id: str | None, phase: Phase | None
    ) -> tuple[list[Session], bool]:
        """Returns open sessions in order of id.

        Args:
            after: Only ids that come after this one; empty: from the start.
            size: Most sessions to return.
            tenant_id: Only this tenant's; None: all.
            phase: Only those in this phase; None: all.

        Returns:
            The sessions, and whether there are more.
        """
        ids = (
            session.session_id
            for session in self._sessions.values()
            if session.session_id > after
            and (tenant_id is None or session.tenant_id == tenant_id)
            and (phase is None or session.phase is phase)
        )
        first = heapq.nsmallest(size + 1, ids)
        return [self._sessions[session_id] for session_id in first[:size]], len(first) > size
