"""Who may open a session now, and in which order those that must wait are let in.

Refusing is queueing: a refused OpenSession gets a ticket under its session id, is told its position
and when to come again, and keeps its place if it does. Whoever does not come again in time loses
it. A session is let in once there is room for it and for all those before it, so that a place that
has become free is not lost while its owner is on the way, and yet nobody takes it from him.

A ticket's rank is the time at which it was drawn, less `aging_s` for each point of priority. So a
priority is worth a certain time of waiting and not more, and nobody starves: from `200 * aging_s`
on after a ticket was drawn, no new one comes before it, whatever its priority. Wakes are not asked:
they always come before new sessions.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from services.common.errors import ExhaustedError
from services.scheduler.policy.room import RECHECK_S, Room
from services.scheduler.timers import Timers

LEAST_RETRY_S = 0.05
MOST_RETRY_S = 30.0

ANY_TENANT = "*"
"""In quotas: each tenant that is not named."""

_RATE_MEMORY = 0.9


@dataclass(frozen=True, slots=True)
class Limits:
    """What admission keeps to.

    Attributes:
        max_sessions: Most sessions open at once; None: no limit.
        quotas: Most sessions open at once by tenant; `ANY_TENANT`: of each one not named.
        max_queued: Tickets kept at most.
        aging_s: How long a wait one point of priority is worth.
    """

    max_sessions: int | None = None
    quotas: Mapping[str, int] | None = None
    max_queued: int = 1000
    aging_s: float = 1.0

    def quota(self, tenant_id: str) -> float:
        """Returns how many sessions a tenant may have open at once."""
        quotas = self.quotas or {}
        return quotas.get(tenant_id, quotas.get(ANY_TENANT, math.inf))


@dataclass(frozen=True, slots=True)
class Applicant:
    """Somebody who wants to open a session.

    Attributes:
        session_id: Names the ticket.
        tokens: That its first prompt is counted for.
    """

    session_id: str
    tenant_id: str = ""
    priority: int = 0
    model: str = ""
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class _Ticket:
    rank: float
    order: int
    applicant: Applicant

    def __lt__(self, other: _Ticket) -> bool:
        return (self.rank, self.order) < (other.rank, other.order)


class Admission:
    """The queue of those who want to open a session.

    Args:
        limits: What to keep to.
        live: Returns how many sessions are open.
        live_of: Returns how many of a tenant's are.

    Attributes:
        admitted: Sessions let in, since the start.
        refused: Times somebody was told to come again.
    """

    def __init__(
        self, limits: Limits, live: Callable[[], int], live_of: Callable[[str], int]
    ) -> None:
        self.admitted = 0
        self.refused = 0
        self._limits = limits
        self._live = live
        self._live_of = live_of
        self._queue: list[_Ticket] = []
        self._tickets: dict[str, _Ticket] = {}
        self._expiries = Timers()
        self._drawn = 0
        self._admitted_s: float | None = None
        self._interval_s = 0.0

    def __len__(self) -> int:
        return len(self._queue)

    def admit(self, applicant: Applicant, rooms: Sequence[Room], now_s: float) -> None:
        """Lets somebody in.

        Args:
            applicant: Who wants in.
            rooms: What each worker that could take the session may be given.
            now_s: The time.

        Raises:
            ExhaustedError: Not now. Its metadata has the `position` in the queue from 1, how many
                are `queued`, and what is short as `limit`; `retry_after_s` is when to come again.
        """
        for session_id in self._expiries.take_due(now_s):
            self._remove(session_id)
        ticket = self._tickets.get(applicant.session_id)
        if ticket is None:
            rank = now_s - applicant.priority * self._limits.aging_s
            ticket = _Ticket(rank, self._drawn, applicant)
            self._drawn += 1
        ahead = self._ahead(ticket)
        problem, wait_s = self._problem(applicant, ahead, rooms)
        if not problem:
            self._let_in(applicant.session_id, now_s)
            return
        self.refused += 1
        wait_s = min(MOST_RETRY_S, max(LEAST_RETRY_S, wait_s))
        self._refuse(ticket, problem, len(ahead) + 1, wait_s, now_s)

    def _let_in(self, session_id: str, now_s: float) -> None:
        self._remove(session_id)
        self._expiries.cancel(session_id)
        self.admitted += 1
        if self._admitted_s is not None:
            passed_s = now_s - self._admitted_s
            self._interval_s = _RATE_MEMORY * self._interval_s + (1 - _RATE_MEMORY) * passed_s
        self._admitted_s = now_s

    def _refuse(
        self, ticket: _Ticket, problem: str, position: int, wait_s: float, now_s: float
    ) -> None:
        session_id = ticket.applicant.session_id
        metadata = {"limit": problem, "queued": str(len(self._queue))}
        if session_id not in self._tickets and len(self._queue) >= self._limits.max_queued:
            raise ExhaustedError(
                f"{problem}, and {len(self._queue)} wait already, as many as may",
                metadata=metadata,
                retry_after_s=MOST_RETRY_S,
            )
        if session_id not in self._tickets:
            self._tickets[session_id] = ticket
            insort(self._queue, ticket)
        # Twice the time, for whoever is a little late.
        self._expiries.set(session_id, now_s + 2 * wait_s + RECHECK_S)
        raise ExhaustedError(
            f"{problem}; position {position} of {len(self._queue)} that wait",
            metadata=metadata | {"position": str(position), "queued": str(len(self._queue))},
            retry_after_s=wait_s,
        )

    def _remove(self, session_id: str) -> None:
        ticket = self._tickets.pop(session_id, None)
        if ticket is not None:
            del self._queue[bisect_left(self._queue, ticket)]

    def _ahead(self, ticket: _Ticket) -> list[Applicant]:
        """Returns those before a ticket who wait for the same and not for another's quota."""
        wanted = ticket.applicant
        free: dict[str, float] = {}
        ahead = []
        for other in self._queue:
            if not other < ticket:
                break
            tenant_id, model = other.applicant.tenant_id, other.applicant.model
            if model and wanted.model and model != wanted.model:
                continue
            if tenant_id not in free:
                free[tenant_id] = self._limits.quota(tenant_id) - self._live_of(tenant_id)
            free[tenant_id] -= 1
            if tenant_id == wanted.tenant_id or free[tenant_id] >= 0:
                ahead.append(other.applicant)
        return ahead

    def _problem(
        self, applicant: Applicant, ahead: Sequence[Applicant], rooms: Sequence[Room]
    ) -> tuple[str, float]:
        """Returns what keeps somebody out, empty if nothing does, and for how long it will."""
        limits = self._limits
        queue_s = max(RECHECK_S, self._interval_s * (len(ahead) + 1))
        tenant_id = applicant.tenant_id
        own = self._live_of(tenant_id)
        before = sum(other.tenant_id == tenant_id for other in ahead)
        quota = limits.quota(tenant_id)
        if own + before >= quota:
            return f"tenant {tenant_id!r} has {own} sessions open and a quota of {quota}", queue_s
        live = self._live()
        if limits.max_sessions is not None and live + len(ahead) >= limits.max_sessions:
            return f"{live} sessions are open and the limit is {limits.max_sessions}", queue_s
        reason = next((room.reason for room in rooms if room.reason), "")
        if sum(room.sessions for room in rooms) < len(ahead) + 1:
            reason = reason or f"{len(ahead)} wait before it"
            return f"the workers are full: {reason}", queue_s
        wanted = sum(other.tokens for other in ahead) + applicant.tokens
        room_tokens = sum(room.tokens for room in rooms)
        short = wanted - room_tokens
        # A prompt that is longer than all the room there ever is comes when it is the first.
        alone = not ahead and any(room.sessions >= 1 and not room.reason for room in rooms)
        if short <= 0 or alone:
            return "", 0.0
        speed = sum(room.tokens_per_s for room in rooms)
        reason = reason or f"{wanted} tokens of new prompts, and room for {room_tokens:.0f}"
        return f"the workers are busy: {reason}", short / speed if speed else queue_s
