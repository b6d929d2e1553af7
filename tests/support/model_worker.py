"""A worker without a network: it takes commands from a `Coordinator` in virtual time.

Commands wait in a queue until `work` carries them out, so that a test decides what happens between
a command and its result.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import Any

from services.scheduler.coordinator import Coordinator
from services.scheduler.domain import (
    NO_KV,
    Capacity,
    Close,
    Command,
    CommandResult,
    Drop,
    EventKind,
    Evict,
    Hello,
    ModelInfo,
    Open,
    Prefetch,
    Residency,
    Restore,
    SessionEvent,
    SessionSnapshot,
    name_of,
)

BLOCKS = 4


class ModelWorker:
    """One worker process.

    Attributes:
        sessions: What it holds.
        queue: Commands received and not carried out.
        log: Names of the actions of all commands received, in order.
        received: All commands received, repeats included.
        closed: Why the scheduler ended the stream; None while it goes on.
    """

    def __init__(self, coordinator: Coordinator, worker_id: str = "w0") -> None:
        self.coordinator = coordinator
        self.worker_id = worker_id
        self.incarnation = 1
        self.model = "tiny"
        self.blocks = 100
        self.sessions: dict[str, SessionSnapshot] = {}
        self.queue: deque[Command] = deque()
        self.received: list[Command] = []
        self.causes: list[float | None] = []
        self.closed: str | None = None
        self.connected = False
        self._done: dict[str, CommandResult] = {}

    # --- as a link ---

    def send(self, command: Command, caused_s: float | None) -> None:
        assert self.connected, "a command was sent to a worker that is not connected"
        self.queue.append(command)
        self.received.append(command)
        self.causes.append(caused_s)

    def close(self, reason: str) -> None:
        self.closed = reason

    @property
    def log(self) -> list[str]:
        return [name_of(command.action) for command in self.received]

    # --- what it does ---

    def connect(self, now_s: float) -> ModelWorker:
        self.connected = True
        self.closed = None
        self.queue.clear()
        self.coordinator.workers.connected(self.hello(), self, now_s)
        return self

    def lose(self, now_s: float) -> None:
        self.connected = False
        self.queue.clear()
        self.coordinator.workers.lost(self.worker_id, self, now_s)

    def restart(self) -> None:
        self.incarnation += 1
        self.sessions.clear()
        self._done.clear()

    def hello(self) -> Hello:
        return Hello(
            worker_id=self.worker_id,
            incarnation_id=f"{self.worker_id}/{self.incarnation}",
            endpoint=f"{self.worker_id}:1",
            model=ModelInfo(self.model, block_size_tokens=16, block_bytes=1024),
            capacity=Capacity(device_blocks=self.blocks, host_blocks=self.blocks),
            snapshot=tuple(self.sessions.values()),
        )

    def state(self) -> Any:
        return self.coordinator.registry.require(self.worker_id)

    def happen(self, kind: EventKind, session_id: str, now_s: float) -> None:
        if self.connected:
            event = SessionEvent(kind, self.sessions[session_id], now_s)
            self.coordinator.workers.happened(self.state(), event, now_s)

    def start_generate(self, session_id: str, now_s: float, record: bytes = b"") -> None:
        if session_id not in self.sessions:
            self.sessions[session_id] = SessionSnapshot(
                session_id, 1, 0, NO_KV, generating=False, record=record, last_generate_s=None
            )
            self.happen(EventKind.CREATED, session_id, now_s)
        session = self.sessions[session_id]
        self.sessions[session_id] = replace(
            session, generating=True, generation=session.generation + 1
        )
        self.happen(EventKind.GENERATE_STARTED, session_id, now_s)

    def finish_generate(self, session_id: str, now_s: float) -> None:
        session = self.sessions[session_id]
        self.sessions[session_id] = replace(
            session,
            generating=False,
            generation=session.generation + 1,
            context_length=session.context_length + 50,
            kv=Residency(BLOCKS, BLOCKS, 0, 0, resident=True),
            last_generate_s=now_s,
        )
        self.happen(EventKind.GENERATE_FINISHED, session_id, now_s)

    def generate(self, session_id: str, now_s: float, record: bytes = b"") -> None:
        self.start_generate(session_id, now_s, record)
        self.finish_generate(session_id, now_s)

    def work(self, now_s: float, most: int | None = None) -> None:
        """Carries commands out, in order: all of them, or `most`."""
        left = most
        while self.queue and left != 0:
            command = self.queue.popleft()
            if command.command_id not in self._done:
                self._done[command.command_id] = self._do(command)
            self.coordinator.workers.ended(self._done[command.command_id], now_s)
            left = left - 1 if left is not None else None

    def answer(self, command: Command, now_s: float, **fields: Any) -> None:
        """Answers a command without doing it."""
        result = CommandResult(command.command_id, command.session_id, **fields)
        self.coordinator.workers.ended(result, now_s)

    def _do(self, command: Command) -> CommandResult:
        session = self.sessions.get(command.session_id)
        if isinstance(command.action, Open):
            if session is None:
                session = SessionSnapshot(
                    command.session_id, 1, 0, NO_KV, False, command.record or b"", None
                )
                self.sessions[command.session_id] = session
            return self._result(command, session)
        if isinstance(command.action, Close):
            self.sessions.pop(command.session_id, None)
            return CommandResult(command.command_id, command.session_id)
        if session is None:
            return self._failure(command, "NOT_FOUND", "SESSION_UNKNOWN")
        if command.expected_generation not in {None, session.generation}:
            return self._failure(command, "FAILED_PRECONDITION", "STALE_GENERATION")
        kv = session.kv
        match command.action:
            case Evict() | Drop() if session.generating:
                return self._failure(command, "FAILED_PRECONDITION", "SESSION_BUSY")
            case Evict():
                kv = kv._replace(resident=False, host_blocks=kv.total_blocks)
            case Restore() | Prefetch():
                kv = kv._replace(resident=kv.total_blocks > 0, device_blocks=kv.total_blocks)
            case Drop():
                kv = Residency(missing_tokens=session.context_length)
        record = session.record if command.record is None else command.record
        session = replace(session, kv=kv, record=record)
        self.sessions[command.session_id] = session
        return self._result(command, session)

    @staticmethod
    def _result(command: Command, session: SessionSnapshot) -> CommandResult:
        return CommandResult(
            command.command_id,
            command.session_id,
            generation=session.generation,
            kv=session.kv,
        )

    def _failure(self, command: Command, code: str, reason: str) -> CommandResult:
        session = self.sessions.get(command.session_id)
        return CommandResult(
            command.command_id,
            command.session_id,
            code=code,
            reason=reason,
            generation=session.generation if session else 0,
            kv=session.kv if session else None,
        )
