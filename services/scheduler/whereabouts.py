"""Which sessions' device blocks were let go, which of them are wanted back, and how that goes."""

from __future__ import annotations

from dataclasses import dataclass

from services.scheduler.domain import Action, Drop, Evict, Prefetch, Restore, SetHint
from services.scheduler.registry import Registry, WorkerState
from services.scheduler.session import Session
from services.scheduler.wake_order import WakeOrder


@dataclass(slots=True)
class PrefetchTally:
    """What has become of prefetches.

    Attributes:
        sent: Asked of workers.
        refused: For which there was no room, or that came too late.
        hits: Whose session woke while it was there.
        wasted: Whose session was let go again before it woke.
        loaded_bytes: Moved by all of them.
    """

    sent: int = 0
    refused: int = 0
    hits: int = 0
    wasted: int = 0
    loaded_bytes: int = 0


class Whereabouts:
    """Keeps who is away, from the commands that are sent and the events that come.

    Args:
        registry: All workers.

    Attributes:
        away: Sessions whose device blocks were let go, by when they are expected.
        wanting: Sessions that are to be prefetched as soon as there is room.
        prefetches: What has become of prefetches.
    """

    def __init__(self, registry: Registry) -> None:
        self.away = WakeOrder()
        self.wanting = WakeOrder()
        self.prefetches = PrefetchTally()
        self._registry = registry

    def want(self, session: Session) -> None:
        """Notes that a session is to be prefetched as soon as there is room."""
        self.wanting.set(session.session_id, session.worker_id, session.expected_wake_s)

    def found_away(self, session: Session) -> None:
        """Notes that a session is away, nobody knows since when."""
        self.away.set(session.session_id, session.worker_id, session.expected_wake_s)

    def woke(self, session: Session) -> None:
        """Notes that a session which was prefetched runs, or says that it will."""
        self.prefetches.hits += session.evicted_s is None

    def forget(self, session_id: str) -> None:
        """Forgets a session."""
        self.away.remove(session_id)
        self.wanting.remove(session_id)

    def let_go(self, session: Session, now_s: float) -> None:
        """Notes that a session's device blocks may be reused from now on."""
        if session.prefetched and session.evicted_s is None:
            self.prefetches.wasted += 1
        session.evicted_s = now_s
        self.away.set(session.session_id, session.worker_id, session.expected_wake_s)

    def taken_back(self, session: Session) -> None:
        """Notes that a session's device blocks are its own again, or that it has none."""
        session.evicted_s = None
        self.away.remove(session.session_id)
        self.wanting.remove(session.session_id)

    def refused(self, session: Session, action: Action, reason: str) -> None:
        """Notes that a command to move a session failed; a prefetch without room is still wanted.

        Args:
            session: The session.
            action: What was not done.
            reason: Why, as the worker says it.
        """
        if not session.kv.resident and not session.generating:
            self.found_away(session)
        if not isinstance(action, Prefetch):
            return
        self.prefetches.refused += 1
        session.prefetched = False
        worker = self._registry.connected(session.worker_id)
        if reason == "EXHAUSTED" and worker is not None:
            self.want(session)
            worker.prefetch_refused = True
            self._registry.changed(worker)

    def commanded(
        self, session: Session, worker: WorkerState, action: Action, now_s: float
    ) -> None:
        """Keeps what is known of a session's place in line with a command about it."""
        match action:
            case Evict(expected_wake_s=wake_s):
                session.expected_wake_s = wake_s
                self.let_go(session, now_s)
            case SetHint(expected_wake_s=wake_s):
                session.expected_wake_s = wake_s
                if session.session_id in self.away:
                    self.away.set(session.session_id, session.worker_id, wake_s)
            case Prefetch():
                self.prefetches.sent += 1
                session.prefetched = True
                worker.prefetched_blocks += session.kv.total_blocks
                self.taken_back(session)
                self._registry.changed(worker)
            case Drop():
                worker.dropped_blocks += session.kv.host_blocks
                self.taken_back(session)
                self._registry.changed(worker)
            case Restore():
                self.taken_back(session)
            case _:
                pass
