"""The scheduler's commands on a modelled worker: what each does, and when it is done."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from services.scheduler.domain import (
    Close,
    Command,
    CommandResult,
    Drop,
    Evict,
    Open,
    Prefetch,
    Restore,
    SetHint,
)
from services.scheduler.simulation.clock import Events
from services.scheduler.simulation.kv_model import NEVER_S
from services.scheduler.simulation.lanes import Urgency
from services.scheduler.simulation.mover import ModelSession, Mover
from services.scheduler.simulation.parameters import WorkerParameters

if TYPE_CHECKING:
    from services.scheduler.simulation.worker_model import WorkerModel


class CommandModel:
    """Carries commands out on a worker's sessions.

    Args:
        worker: Whose sessions.
        mover: Moves their KV.
        events: The time.
        parameters: The worker's.
        on_result: Told of each result when it has arrived at the scheduler.
    """

    def __init__(
        self,
        worker: WorkerModel,
        mover: Mover,
        events: Events,
        parameters: WorkerParameters,
        on_result: Callable[[CommandResult], None],
    ) -> None:
        self._worker = worker
        self._mover = mover
        self._events = events
        self._parameters = parameters
        self._on_result = on_result
        # Restores that found no room.
        self._roomless: deque[tuple[Command, ModelSession]] = deque()

    def begin(self, command: Command) -> None:
        """Starts a command that has arrived; it ends in exactly one result."""
        session = self._worker.sessions.get(command.session_id)
        action = command.action
        if session is None:
            if isinstance(action, Open):
                session = self._worker.create(
                    command.session_id, action.priority, command.record or b""
                )
            else:
                known = isinstance(action, Close)
                self._answer(command, None, "" if known else "SESSION_UNKNOWN")
                return
        expected = command.expected_generation
        if expected is not None and expected != session.generation:
            self._answer(command, session, "STALE_GENERATION")
            return
        if isinstance(action, Evict | Drop | Close) and session.kv.busy:
            self._answer(command, session, "SESSION_BUSY")
            return
        if command.record is not None:
            session.record = command.record
        self._carry_out(command, session)

    def _carry_out(self, command: Command, session: ModelSession) -> None:
        match command.action:
            case Evict(expected_wake_s=wake_s):
                self._mover.kv.set_wake(session.kv, NEVER_S if wake_s is None else wake_s)
                self._evict(command, session)
            case Restore():
                self._restore(command, session)
            case Prefetch():
                if self._mover.hold(session, Urgency.PREFETCH):
                    self._answer_after_load(command, session)
                else:
                    self._answer(command, session, "EXHAUSTED")
            case Drop():
                self._mover.drop(session)
                session.answer_all()
                self._answer(command, session)
            case Close():
                self._mover.forget(session)
                session.answer_all()
                del self._worker.sessions[session.session_id]
                self._answer(command, None)
            case SetHint(expected_wake_s=wake_s, priority=priority):
                self._mover.kv.set_wake(session.kv, NEVER_S if wake_s is None else wake_s)
                session.priority = session.priority if priority is None else priority
                self._answer(command, session)
            case _:
                self._answer(command, session)
        self._worker.turn()

    def _evict(self, command: Command, session: ModelSession) -> None:
        for entry in [entry for entry in self._roomless if entry[1] is session]:
            self._roomless.remove(entry)
            self._answer(entry[0], session, "WRONG_STATE")
        if session.kv.held:
            self._mover.counters.evictions += 1
        self._mover.evict(session)
        if session.kv.storing:
            session.after_store.append(lambda: self._answer(command, session))
        else:
            self._answer(command, session)

    def _restore(self, command: Command, session: ModelSession) -> None:
        if not self._mover.hold(session, Urgency.WAKE):
            self._worker.make_room(self._mover.kv.room_needed(session.kv, 0))
            if not self._mover.hold(session, Urgency.WAKE):
                self._roomless.append((command, session))
                return
        self._answer_after_load(command, session)

    def retry(self) -> None:
        """Tries the restores again that found no room, in order, until one finds none."""
        while self._roomless:
            command, session = self._roomless[0]
            late = command.deadline_s is not None and self._events.now_s > command.deadline_s
            gone = self._worker.sessions.get(session.session_id) is not session
            if not (late or gone) and not self._mover.hold(session, Urgency.WAKE):
                return
            self._roomless.popleft()
            if late or gone:
                self._answer(command, None if gone else session, "EXHAUSTED")
            else:
                self._answer_after_load(command, session)

    def _answer_after_load(self, command: Command, session: ModelSession) -> None:
        blocks = session.kv.loading
        if blocks:
            session.after_load.append(lambda: self._answer(command, session, moved_blocks=blocks))
        else:
            self._answer(command, session)

    def _answer(
        self,
        command: Command,
        session: ModelSession | None,
        reason: str = "",
        moved_blocks: int = 0,
    ) -> None:
        result = CommandResult(
            command.command_id,
            command.session_id,
            code="FAILED_PRECONDITION" if reason else "OK",
            reason=reason,
            moved_blocks=moved_blocks,
            moved_bytes=moved_blocks * self._parameters.block_bytes,
            generation=session.generation if session is not None else 0,
            kv=session.residency() if session is not None else None,
        )
        self._events.after(self._parameters.latencies.event_s, self._on_result, result)
