"""All sessions: the open ones, and for a while the ids of those that have ended."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterator

from services.scheduler.domain import Phase
from services.scheduler.session import Session, Signal, Transition


class SessionStore:
    """Sessions by id, counted by phase.

    Args:
        closed_kept: Ended sessions remembered at most.
        closed_ttl_s: How long an ended session is remembered at most.
    """

    def __init__(self, closed_kept: int, closed_ttl_s: float) -> None:
        self._sessions: dict[str, Session] = {}
        self._counts = dict.fromkeys(Phase, 0)
        self._closed: OrderedDict[str, float] = OrderedDict()
        self._closed_kept = closed_kept
        self._closed_ttl_s = closed_ttl_s

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

    def add(self, session: Session) -> None:
        """Takes in a session whose id is new."""
        self._sessions[session.session_id] = session
        self._counts[session.phase] += 1

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

    def close(self, session_id: str, now_s: float) -> Session | None:
        """Ends a session, and remembers that it has ended, also if it was not known.

        Returns:
            The session that was open; None if none was.
        """
        session = self._sessions.pop(session_id, None)
        if session is not None:
            self._counts[session.phase] -= 1
            session.close(now_s)
        if session_id not in self._closed:
            self._closed[session_id] = now_s
        if len(self._closed) > self._closed_kept:
            self._closed.popitem(last=False)
        return session

    def is_closed(self, session_id: str) -> bool:
        """Whether a session of this id is remembered to have ended."""
        return session_id in self._closed

    def forget_closed(self, now_s: float) -> None:
        """Forgets the sessions that ended too long ago."""
        while self._closed:
            session_id, closed_s = next(iter(self._closed.items()))
            if closed_s + self._closed_ttl_s > now_s:
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
