"""The scheduler's commands: what each does, and when it is done.

A command is done at once, or when the copies it waits for are, or, a restore without room, when
there is some. Each ends in exactly one `CommandDone`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from services.common.errors import (
    CommandTimeoutError,
    DjinnError,
    ErrorInfo,
    ExhaustedError,
    SessionBusyError,
    SessionClosedError,
    StaleGenerationError,
    UnknownSessionError,
    WrongStateError,
)
from services.worker.engine.block import CopyTicket
from services.worker.engine.kv_mover import FinishedCopy, KvMover
from services.worker.engine.room import Room, await_wake
from services.worker.engine.sequence import Session
from services.worker.engine.streams import Event
from services.worker.engine.transfer import Priority
from services.worker.messages import (
    Close,
    Command,
    CommandDone,
    Drop,
    Evict,
    EvictMode,
    Open,
    Prefetch,
    Residency,
    Restore,
    SetHint,
)

if TYPE_CHECKING:
    from services.worker.engine.engine import Engine


@dataclass(eq=False, slots=True)
class _Pending:
    """A command that is not done yet.

    Attributes:
        tickets: The copies it waits for; empty for a restore that waits for room.
        resident_blocks: Blocks that need no copy.
        generation: The session's when it was taken on.
        taken_ns: When it was taken on.
    """

    command: Command
    session: Session
    generation: int
    tickets: set[CopyTicket] = field(default_factory=set)
    moved_blocks: int = 0
    resident_blocks: int = 0
    copy_start_ns: int = 0
    copy_end_ns: int = 0
    taken_ns: int = field(default_factory=time.time_ns)

    @staticmethod
    def of(command: Command, session: Session | None) -> _Pending:
        """Returns a command that is taken on; None: of a session that is not known."""
        session = session or Session(command.session_id, b"", 0)
        return _Pending(command, session, session.generation)

    def count(self, copy: FinishedCopy) -> None:
        """Widens the time of its copies by one of them."""
        self.copy_start_ns = min(self.copy_start_ns or copy.start_ns, copy.start_ns)
        self.copy_end_ns = max(self.copy_end_ns, copy.end_ns)


class Commands:
    """Carries commands out on an engine's sessions.

    Args:
        engine: Whose sessions.
        mover: Moves their KV.
        room: Where blocks come from when none are available.
        scrub: Overwrites device blocks behind all launched steps; returns an event for it.
    """

    def __init__(
        self, engine: Engine, mover: KvMover, room: Room, scrub: Callable[[list[int]], Event]
    ) -> None:
        self._engine = engine
        self._mover = mover
        self._room = room
        self._scrub = scrub
        self._copying: list[_Pending] = []
        # In the order in which they get their room.
        self._roomless: list[_Pending] = []

    def begin(self, command: Command) -> None:
        """Starts a command; a failure becomes its result."""
        session = self._engine.sessions.get(command.session_id)
        try:
            if isinstance(command.action, Open):
                session = session or self._engine.create(
                    command.session_id, command.action.cache_salt, command.action.priority, b""
                )
            elif session is None:
                if isinstance(command.action, Close):
                    self._done(_Pending.of(command, None))
                    return
                raise UnknownSessionError.of(command.session_id)
            self._check(command, session)
            if command.scheduler_record is not None:
                session.scheduler_record = command.scheduler_record
            self._carry_out(_Pending.of(command, session))
        except DjinnError as error:
            self._fail(command, session, error)

    def collect(self, done: list[FinishedCopy]) -> None:
        """Ends the commands that waited for these copies."""
        if not done:
            return
        for pending in list(self._copying):
            for copy in done:
                if copy.ticket in pending.tickets:
                    pending.tickets.remove(copy.ticket)
                    pending.count(copy)
            if not pending.tickets:
                self._copying.remove(pending)
                self._copied(pending)

    def retry(self) -> None:
        """Tries the restores that found no room again, and fails those whose time is up.

        One whose session has got a request since is done, for that brings the KV itself.
        """
        now_ns = time.time_ns()
        waiting, self._roomless = self._roomless, []
        for pending in waiting:
            deadline_ns = pending.command.deadline_ns
            if deadline_ns is not None and now_ns > deadline_ns:
                error = ExhaustedError(
                    f"no room on the device for session {pending.session.session_id!r}"
                )
                self._fail(pending.command, pending.session, error)
            elif pending.session.generation != pending.generation:
                self._done(pending)
            else:
                self._restore(pending)

    def forget(self, session: Session) -> None:
        """Fails the pending commands of a session that is being closed."""
        for queue in (self._copying, self._roomless):
            for pending in [p for p in queue if p.session is session]:
                queue.remove(pending)
                error = SessionClosedError(f"session {session.session_id!r} was closed")
                self._fail(pending.command, session, error)

    # --- the actions -----------------------------------------------------------------------------

    def _check(self, command: Command, session: Session) -> None:
        if command.deadline_ns is not None and time.time_ns() > command.deadline_ns:
            raise CommandTimeoutError(f"command {command.command_id!r} came after its deadline")
        expected = command.expected_generation
        if expected is not None and expected != session.generation:
            raise StaleGenerationError(
                f"expected_generation: {expected}, but session {session.session_id!r} is at "
                f"{session.generation}",
                metadata={"generation": str(session.generation)},
            )

    def _carry_out(self, pending: _Pending) -> None:
        session = pending.session
        match pending.command.action:
            case Open():
                self._done(pending)
            case Close():
                self._engine.close(session)
                self._done(pending)
            case Evict(expected_wake_ns=wake_ns):
                self._refuse_if_generating(session, "evicted")
                self._mover.blocks.set_wake(session.kv, wake_ns)
                session.awaited_until_ns = 0
                self._evict(pending)
            case Restore():
                self._restore(pending)
            case Prefetch():
                self._prefetch(pending)
            case Drop():
                self._refuse_if_generating(session, "dropped")
                session.awaited_until_ns = 0
                self._mover.drop(session)
                self._done(pending)
            case SetHint(expected_wake_ns=wake_ns, priority=priority):
                self._mover.blocks.set_wake(session.kv, wake_ns)
                if priority is not None:
                    session.priority = priority
                self._done(pending)

    @staticmethod
    def _refuse_if_generating(session: Session, what: str) -> None:
        if session.request is not None:
            raise SessionBusyError(
                f"session {session.session_id!r} runs request {session.request.request_id!r} "
                f"and cannot be {what}"
            )

    def _evict(self, pending: _Pending) -> None:
        session = pending.session
        for restore in [p for p in self._roomless if p.session is session]:
            self._roomless.remove(restore)
            self._fail(restore.command, session, WrongStateError("an eviction came after it"))
        if session.kv.held and self._mover.mode.offload:
            self._mover.counters.evictions += 1
        pending.tickets = self._mover.evict(session)
        pending.moved_blocks = sum(b.store is not None for b in session.kv.blocks)
        pending.resident_blocks = len(session.kv.blocks) - pending.moved_blocks
        self._wait(pending)

    def _restore(self, pending: _Pending) -> None:
        session = pending.session
        before = session.source
        held = session.kv.held
        if session.request is None:
            await_wake(session)
        must_wait = not held and (self._room.owed or bool(self._roomless))
        if must_wait or not self._hold(session):
            self._roomless.append(pending)
            return
        pending.moved_blocks = session.source.loaded_blocks - before.loaded_blocks
        pending.resident_blocks = (
            len(session.kv.blocks)
            if held
            else session.source.resident_blocks - before.resident_blocks
        )
        pending.tickets = set(session.loading)
        self._wait(pending)

    def _hold(self, session: Session) -> bool:
        return self._room.find(
            attempt=lambda: self._mover.hold(session, Priority.WAKE),
            need=lambda: self._mover.blocks.room_needed(session.kv),
            spare_awaited=True,
        )

    def _prefetch(self, pending: _Pending) -> None:
        session = pending.session
        before = session.source
        owed = self._room.owed and not session.kv.held
        if owed or not self._mover.hold(session, Priority.PREFETCH):
            raise ExhaustedError(f"no free blocks to prefetch session {session.session_id!r} into")
        if session.request is None:
            await_wake(session)
        pending.moved_blocks = session.source.loaded_blocks - before.loaded_blocks
        pending.resident_blocks = len(session.kv.blocks) - pending.moved_blocks
        pending.tickets = set(session.loading)
        self._wait(pending)

    # --- their ends ------------------------------------------------------------------------------

    def _wait(self, pending: _Pending) -> None:
        if pending.tickets:
            self._copying.append(pending)
        else:
            self._copied(pending)

    def _copied(self, pending: _Pending) -> None:
        action = pending.command.action
        if isinstance(action, Evict) and not pending.session.kv.held:
            if action.mode is not EvictMode.LAZY:
                self._release(pending.session, scrub=action.mode is EvictMode.SCRUB)
            if not self._mover.is_clean(pending.session) and action.mode is not EvictMode.LAZY:
                error = ExhaustedError(
                    f"no room on the host for all blocks of {pending.session.session_id!r}"
                )
                self._fail(pending.command, pending.session, error)
                return
        self._done(pending)

    def _release(self, session: Session, *, scrub: bool) -> None:
        slots = self._mover.blocks.release_device(session.kv)
        if scrub and slots:
            self._mover.blocks.touch(slots, self._scrub(slots))

    def _done(self, pending: _Pending) -> None:
        self._tell(pending, None)

    def _fail(self, command: Command, session: Session | None, error: DjinnError) -> None:
        self._tell(_Pending.of(command, session), error.to_info())

    def _tell(self, pending: _Pending, error: ErrorInfo | None) -> None:
        command, session = pending.command, pending.session
        now_ns = time.time_ns()
        known = command.session_id in self._engine.sessions
        self._engine.outbox.append(
            CommandDone(
                command_id=command.command_id,
                session_id=command.session_id,
                error=error,
                generation=session.generation,
                kv=(
                    self._mover.blocks.residency(session.kv, len(session.tokens))
                    if known
                    else Residency()
                ),
                moved_bytes=pending.moved_blocks * self._mover.block_bytes,
                moved_blocks=pending.moved_blocks,
                resident_blocks=pending.resident_blocks,
                copy_start_ns=pending.copy_start_ns,
                copy_end_ns=pending.copy_end_ns,
                received_ns=command.received_ns,
                done_ns=now_ns,
                taken_ns=pending.taken_ns,
            )
        )
