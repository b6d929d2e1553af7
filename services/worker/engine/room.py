"""Room on the device for those who need it, at the cost of those who need it less.

A Generate always gets its room. A command of the scheduler's does not: what was restored for a wake
that is still to come is not taken for another's, or two restores would take each other's blocks in
turn and no agent would go on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from services.worker.engine.kv_mover import KvMover
from services.worker.engine.sequence import Session
from services.worker.messages import SessionEventKind

_WAKE_OVERDUE_NS = 5_000_000_000
"""A wake that has not come by then may be long in coming."""


def await_wake(session: Session) -> None:
    """Notes that a session's KV is on the device, or shall be, for a wake that is about to come."""
    session.awaited_until_ns = time.time_ns() + _WAKE_OVERDUE_NS


def _nobody() -> bool:
    return False


class Room:
    """Gets room on the device.

    Args:
        mover: Evicts and drops.
        sessions: All, by id.
        tell: Told who was evicted and who was dropped.

    Attributes:
        owed: A request waits for room: what comes free is for it, and not for commands.
    """

    def __init__(
        self,
        mover: KvMover,
        sessions: Mapping[str, Session],
        tell: Callable[[SessionEventKind, Session], None],
    ) -> None:
        self.owed = False
        self._mover = mover
        self._blocks = mover.blocks
        self._sessions = sessions
        self._tell = tell

    def find(
        self,
        attempt: Callable[[], bool],
        need: Callable[[], int],
        *,
        waiting: Sequence[Session] = (),
        sacrifice: Callable[[], bool] = _nobody,
        spare_awaited: bool = False,
    ) -> bool:
        """Tries until it succeeds, until room is sure to come, or until nobody can be sacrificed.

        Args:
            attempt: Takes the room if it is there.
            need: How many blocks must be available for it.
            waiting: See `make`.
            sacrifice: Takes the blocks of somebody less urgent; False if there is nobody.
            spare_awaited: See `make`.
        """
        while not attempt():
            self.make(need(), waiting, spare_awaited=spare_awaited)
            if attempt():
                return True
            if self._blocks.coming_device() >= need():
                return False  # as soon as the stores under way are done
            if not sacrifice():
                return False
        return True

    def make(
        self, want_blocks: int, waiting: Sequence[Session] = (), *, spare_awaited: bool = False
    ) -> None:
        """Works towards `want_blocks` available device blocks; some may come only later.

        First sessions that are idle on the device are evicted: those whose wake is about to come
        last, else the furthest expected wake first. Then, when the host is full too, sessions that
        are evicted already are dropped to tokens.

        Args:
            want_blocks: How many blocks shall be available.
            waiting: Sessions whose request waits, in order of service; the last is dropped first,
                and only if no idle one is left. Only those that hold nothing are dropped.
            spare_awaited: Take nothing from sessions whose wake is about to come, and nothing from
                anybody if that cannot be enough.
        """
        if self._blocks.coming_device() >= want_blocks:
            return
        evictable = [s for s in self._idle(self._mover.held, spare_awaited) if not s.loading]
        if spare_awaited:
            victims = evictable
            if self._mover.stranded:
                victims = self._idle(self._sessions.values(), spare_awaited)
            most_blocks = sum(len(session.kv.blocks) for session in victims)
            if self._blocks.coming_device() + most_blocks < want_blocks:
                return
        for session in evictable:
            self._mover.evict(session)
            if self._mover.mode.offload:
                self._mover.counters.evictions += 1
                self._tell(SessionEventKind.EVICTED, session)
            else:
                self._tell(SessionEventKind.DROPPED, session)
            if self._blocks.coming_device() >= want_blocks:
                return
        if self._mover.stranded:
            idle = self._idle(self._sessions.values(), spare_awaited)
            self._drop([*idle, *reversed(waiting)], want_blocks)

    def _drop(self, sessions: Iterable[Session], want_blocks: int) -> None:
        """Drops those that hold nothing, until `want_blocks` come or it does not help any more."""
        for session in sessions:
            if not self._mover.stranded or self._blocks.coming_device() >= want_blocks:
                return
            if not session.kv.held and session.kv.blocks:
                self._mover.drop(session)
                self._tell(SessionEventKind.DROPPED, session)
                self._mover.store_stranded()

    def _idle(self, sessions: Iterable[Session], spare_awaited: bool) -> list[Session]:
        """Returns the sessions that have blocks and no request, least worth first."""
        now_ns = time.time_ns()
        idle = [
            session
            for session in sessions
            if session.request is None
            and session.kv.blocks
            and not (spare_awaited and session.awaited_until_ns > now_ns)
        ]
        return sorted(idle, key=lambda session: _least_worth_first(session, now_ns))


def _least_worth_first(session: Session, now_ns: int) -> tuple[bool, float, int]:
    """Sort key: who is expected latest comes first, and of those unknown who was used longest ago.

    An unknown wake is taken as far, but for one that is about to come.
    """
    wake_ns = session.kv.expected_wake_ns
    far = -math.inf if wake_ns is None else -float(wake_ns)
    return session.awaited_until_ns > now_ns, far, session.used_ns
