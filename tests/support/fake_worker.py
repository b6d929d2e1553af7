"""A worker without a model: it speaks the control stream over real gRPC and keeps sessions' books.

It obeys every command at once, unless told by `refuse` or `hold` to do otherwise, and answers a
repeated command id with its first result, as a real worker does.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import grpc
from google.protobuf.timestamp_pb2 import Timestamp

from djinn.v1 import control_service_pb2 as pb
from djinn.v1 import control_service_pb2_grpc as pb_grpc
from djinn.v1 import types_pb2 as types
from services.common.errors import DjinnError, StaleGenerationError, UnknownSessionError
from services.common.status import status_from_error

BLOCKS_PER_SESSION = 4
BLOCK_BYTES = 1024


class FakeWorker:
    """One worker process, which may connect more than once.

    Attributes:
        worker_id: Its name.
        incarnation_id: Names the process.
        endpoint: Where it says that it serves.
        sessions: What it holds.
        commands: Every command received, repeats included, in order.
        welcome: What the scheduler last answered to Hello.
        ended: How the last stream ended; None while it goes on.
    """

    def __init__(
        self,
        worker_id: str = "worker-0",
        *,
        model: str = "dummy:tiny",
        endpoint: str = "127.0.0.1:15557",
        device_blocks: int = 100,
        host_blocks: int = 400,
    ) -> None:
        self.worker_id = worker_id
        self.incarnation_id = uuid.uuid4().hex
        self.endpoint = endpoint
        self.model = model
        self.device_blocks = device_blocks
        self.host_blocks = host_blocks
        self.draining = False
        self.sessions: dict[str, pb.SessionSnapshot] = {}
        self.commands: list[pb.Command] = []
        self.counters = types.WorkerCounters()
        self.welcome: pb.Welcome | None = None
        self.ended: grpc.StatusCode | None = None
        self.ended_details = ""
        self._inbox: asyncio.Queue[pb.Command] = asyncio.Queue()
        self._results: dict[str, pb.CommandResult] = {}
        self._refusals: dict[str, list[DjinnError]] = {}
        self._held: set[str] = set()
        self._outbox: asyncio.Queue[pb.ConnectRequest | None] = asyncio.Queue()
        self._channel: grpc.aio.Channel | None = None
        self._reader: asyncio.Task[None] | None = None
        self._over = asyncio.Event()

    # --- connecting ---

    async def connect(self, target: str) -> FakeWorker:
        """Dials the scheduler, says Hello with all it holds, and waits for the Welcome."""
        await self.disconnect()
        self._outbox = asyncio.Queue()
        self._over.clear()
        self.welcome = None
        self.ended = None
        self._channel = grpc.aio.insecure_channel(target)
        first: Any
        call = pb_grpc.WorkerControlServiceStub(self._channel).Connect(self._requests(self._outbox))
        self.send(hello=self.hello())
        first = await call.read()
        assert first.WhichOneof("message") == "welcome"
        self.welcome = first.welcome
        self._reader = asyncio.create_task(self._read(call))
        return self

    async def disconnect(self) -> None:
        """Goes away without a word, as a killed process does; it keeps what it holds."""
        if self._reader is not None:
            self._reader.cancel()
            with suppress(asyncio.CancelledError):
                await self._reader
            self._reader = None
        if self._channel is not None:
            self._outbox.put_nowait(None)
            await self._channel.close()
            self._channel = None

    def restart(self) -> None:
        """Becomes a new process that holds nothing."""
        self.incarnation_id = uuid.uuid4().hex
        self.sessions.clear()
        self._results.clear()
        self.counters = types.WorkerCounters()

    async def wait_ended(self) -> None:
        """Waits until the scheduler has ended the stream."""
        await self._over.wait()

    def hello(self) -> pb.Hello:
        """Returns what it says first."""
        return pb.Hello(
            worker_id=self.worker_id,
            incarnation_id=self.incarnation_id,
            advertised_endpoint=self.endpoint,
            model=types.ModelInfo(
                model=self.model, block_size_tokens=16, block_bytes=BLOCK_BYTES, vocab_size=256
            ),
            capacity=pb.WorkerCapacity(
                device_blocks=self.device_blocks, host_blocks=self.host_blocks
            ),
            snapshot=list(self.sessions.values()),
            metrics_endpoint="127.0.0.1:19096",
            draining=self.draining,
        )

    # --- how it behaves ---

    def refuse(self, action: str, *errors: DjinnError) -> None:
        """Has the next commands of a kind fail, one with each error."""
        self._refusals.setdefault(action, []).extend(errors)

    def hold(self, *actions: str) -> None:
        """Has commands of these kinds neither done nor answered; none: all are again."""
        self._held = set(actions)

    async def expect(self, action: str) -> pb.Command:
        """Returns the next command, which must be of this kind."""
        command = await self._inbox.get()
        assert command.WhichOneof("action") == action, f"{action} expected, got {command}"
        return command

    def no_more_commands(self) -> bool:
        """Whether every command received has been expected."""
        return self._inbox.empty()

    # --- what it says ---

    def send(self, **message: object) -> None:
        """Sends one message up the stream."""
        self._outbox.put_nowait(pb.ConnectRequest(**message))  # type: ignore[arg-type]

    def happen(self, kind: str, session_id: str) -> None:
        """Sends a session's event, such as ``"CREATED"``."""
        self.send(
            session_event=pb.SessionEvent(
                type=pb.SessionEventType.Value(f"SESSION_EVENT_TYPE_{kind}"),
                session=self.sessions[session_id],
                event_time=_now(),
            )
        )

    def start_generate(self, session_id: str, record: bytes = b"") -> None:
        """Takes a Generate on; makes the session if it is not there."""
        if session_id not in self.sessions:
            self.sessions[session_id] = pb.SessionSnapshot(
                session_id=session_id, generation=1, scheduler_record=record
            )
            self.happen("CREATED", session_id)
        session = self.sessions[session_id]
        session.generating = True
        session.generation += 1
        self.happen("GENERATE_STARTED", session_id)

    def finish_generate(self, session_id: str, tokens: int = 50) -> None:
        """Ends a Generate well."""
        session = self.sessions[session_id]
        session.generating = False
        session.generation += 1
        session.context_length += tokens
        session.kv.CopyFrom(
            types.KvResidency(
                total_blocks=BLOCKS_PER_SESSION, device_blocks=BLOCKS_PER_SESSION, resident=True
            )
        )
        session.last_generate_time.CopyFrom(_now())
        self.happen("GENERATE_FINISHED", session_id)

    def generate(self, session_id: str, record: bytes = b"") -> None:
        """Runs a whole Generate."""
        self.start_generate(session_id, record)
        self.finish_generate(session_id)

    def report(self, **extra: object) -> None:
        """Sends a memory report."""
        resident = sum(session.kv.resident for session in self.sessions.values())
        used = resident * BLOCKS_PER_SESSION
        stored = sum(session.kv.host_blocks for session in self.sessions.values())
        self.send(
            memory_report=pb.MemoryReport(
                device=types.PoolReport(
                    total_blocks=self.device_blocks,
                    used_blocks=used,
                    free_blocks=self.device_blocks - used,
                ),
                host=types.PoolReport(
                    total_blocks=self.host_blocks,
                    used_blocks=stored,
                    free_blocks=self.host_blocks - stored,
                ),
                counters=self.counters,
                sessions=len(self.sessions),
                **extra,  # type: ignore[arg-type]
            )
        )

    # --- commands ---

    async def _requests(
        self, outbox: asyncio.Queue[pb.ConnectRequest | None]
    ) -> AsyncIterator[pb.ConnectRequest]:
        while (message := await outbox.get()) is not None:
            yield message

    async def _read(self, call: grpc.aio.StreamStreamCall) -> None:
        try:
            message: Any
            while (message := await call.read()) is not grpc.aio.EOF:
                self._take(message.command)
        except grpc.aio.AioRpcError:
            pass
        self.ended = await call.code()
        self.ended_details = await call.details()
        self._over.set()

    def _take(self, command: pb.Command) -> None:
        action = command.WhichOneof("action")
        assert action is not None
        self.commands.append(command)
        if action not in self._held:
            if command.command_id not in self._results:
                self.send(ack=pb.CommandAck(command_id=command.command_id))
                self._results[command.command_id] = self._do(command, action)
            self.send(result=self._results[command.command_id])
        self._inbox.put_nowait(command)

    def _do(self, command: pb.Command, action: str) -> pb.CommandResult:
        result = pb.CommandResult(command_id=command.command_id, session_id=command.session_id)
        try:
            self._obey(command, action, result)
        except DjinnError as error:
            result.status.CopyFrom(status_from_error(error))
        session = self.sessions.get(command.session_id)
        if session is not None:
            result.generation = session.generation
            result.kv.CopyFrom(session.kv)
        return result

    def _obey(self, command: pb.Command, action: str, result: pb.CommandResult) -> None:
        refusals = self._refusals.get(action)
        if refusals:
            raise refusals.pop(0)
        if action == "open":
            self.sessions.setdefault(
                command.session_id,
                pb.SessionSnapshot(session_id=command.session_id, generation=1),
            )
        if action == "close":
            self.sessions.pop(command.session_id, None)
            return
        session = self.sessions.get(command.session_id)
        if session is None:
            raise UnknownSessionError.of(command.session_id)
        if command.HasField("expected_generation") and (
            command.expected_generation != session.generation
        ):
            raise StaleGenerationError(f"the generation is {session.generation}")
        if command.HasField("scheduler_record"):
            session.scheduler_record = command.scheduler_record
        self._move(session, action, result)

    def _move(self, session: pb.SessionSnapshot, action: str, result: pb.CommandResult) -> None:
        blocks = session.kv.total_blocks
        if action == "evict" and session.kv.resident:
            session.kv.resident = False
            session.kv.host_blocks = blocks
            self.counters.stores += 1
            self.counters.stored_bytes += blocks * BLOCK_BYTES
            self.counters.evictions += 1
            result.moved_blocks = blocks
            result.moved_bytes = blocks * BLOCK_BYTES
        elif action in {"restore", "prefetch"} and not session.kv.resident:
            session.kv.resident = True
            session.kv.device_blocks = blocks
            self.counters.loads += 1
            self.counters.loaded_bytes += blocks * BLOCK_BYTES
            self.counters.restores += 1
            result.moved_blocks = blocks
            result.moved_bytes = blocks * BLOCK_BYTES
        elif action == "restore":
            result.resident_blocks = blocks
        elif action == "drop":
            session.kv.CopyFrom(types.KvResidency(missing_tokens=session.context_length))
            self.counters.drops += 1


def _now() -> Timestamp:
    stamp = Timestamp()
    stamp.FromNanoseconds(time.time_ns())
    return stamp
