"""A Djinn in a test's own process: real gRPC servers on loopback, scripted replies, faults.

::

    from djinn_client.testing import FakeServer

    async with FakeServer(replies=["Search for djinns.", "They are spirits."]) as fake:
        async with await djinn.connect(fake.endpoint) as client:
            await my_agent(client)
    assert [signal.phase for signal in fake.signals] == ["IO_WAIT", "COMPUTE"]

Code without an event loop uses `fake_server`, which runs one in a thread of its own::

    with fake_server(replies=["Search."]) as fake, djinn.connect(fake.endpoint) as client:
        my_agent(client)

Bytes are its tokens, so that texts and token ids can be compared by eye. What is not scripted is
answered with the number of tokens read.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import grpc.aio

from djinn.v1 import (
    admin_service_pb2_grpc,
    agent_service_pb2,
    agent_service_pb2_grpc,
    inference_service_pb2,
    inference_service_pb2_grpc,
    types_pb2,
)
from djinn_client import _fake_model, _fake_scheduler, _fake_worker
from djinn_client._convert import phase_from_proto, seconds_of
from djinn_client._fake_faults import REASONS, FaultError
from djinn_client._portal import Portal
from djinn_client._types import Phase

__all__ = ["FakeServer", "RecordedGenerate", "RecordedSignal", "fake_server"]

_OPTIONS = (
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
)


@dataclass(frozen=True, slots=True)
class RecordedSignal:
    """A phase signal that reached the fake, repetitions included."""

    session_id: str
    phase: Phase
    sequence: int
    tool_name: str
    expected_s: float | None
    traceparent: str
    streamed: bool


@dataclass(frozen=True, slots=True)
class RecordedGenerate:
    """A Generate call that reached the fake.

    Attributes:
        session_id: Whose it was.
        full_context: The whole context, if it was sent.
        expected_context_length: Its length, if only that was sent.
        append: What was appended: text, token ids, or turns of (role, content).
        max_tokens: As asked for.
        seed: As asked for.
        traceparent: W3C trace context; empty if none was sent.
    """

    session_id: str
    full_context: tuple[int, ...] | None
    expected_context_length: int | None
    append: str | tuple[int, ...] | tuple[tuple[str, str], ...]
    max_tokens: int | None
    seed: int | None
    traceparent: str


@dataclass(frozen=True, slots=True)
class Fault:
    """An error that a call is to fail with."""

    error: FaultError
    after_tokens: int | None


class FakeServer:
    """A scheduler and a worker, each with its own port, in the running event loop.

    Args:
        replies: What the model says, in order, each to a context that it has not seen.
        max_context_length: The model's limit, in tokens.
        streams_phases: False refuses the stream of phases, as some proxies do.
        page_size: Most sessions per page of ListSessions.

    Attributes:
        signals: All phase signals, in the order they came.
        requests: All Generate calls, in the order they came.
        commands: All admin commands as (method, session id).
        answers_signals: False has the stream of phases take signals and never answer.
    """

    def __init__(
        self,
        replies: Iterable[str] = (),
        *,
        max_context_length: int = 4096,
        streams_phases: bool = True,
        page_size: int = 1000,
    ) -> None:
        self.signals: list[RecordedSignal] = []
        self.requests: list[RecordedGenerate] = []
        self.commands: list[tuple[str, str]] = []
        self.model = _fake_model.ScriptedModel()
        for reply in replies:
            self.model.add(reply)
        self.model_info = types_pb2.ModelInfo(
            model="fake",
            vocab_size=_fake_model.VOCAB_SIZE,
            max_context_length=max_context_length,
            eos_token_ids=[_fake_model.EOS],
            block_size_tokens=16,
            block_bytes=16,
            dtype="float32",
            has_tokenizer=True,
            has_chat_template=True,
        )
        self.streams_phases = streams_phases
        self.page_size = page_size
        self.answers_signals = True
        self.draining = False
        self.generated_tokens = 0
        self._faults: dict[str, list[Fault]] = {}
        self._held_at: int | None = None
        self._changed = asyncio.Condition()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._notifications: set[asyncio.Task[None]] = set()
        self._scheduler: grpc.aio.Server | None = None
        self._worker: grpc.aio.Server | None = None
        self._worker_state = _fake_worker.WorkerState()
        self._scheduler_port = 0
        self._worker_port = 0

    # --- addresses and life ----------------------------------------------------------------------

    @property
    def endpoint(self) -> str:
        """host:port of the scheduler, for `connect`."""
        return f"127.0.0.1:{self._scheduler_port}"

    @property
    def worker_endpoint(self) -> str:
        """host:port of the worker."""
        return f"127.0.0.1:{self._worker_port}"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Starts worker and scheduler."""
        self._loop = asyncio.get_running_loop()
        await self.start_worker()
        await self.start_scheduler()

    async def stop(self) -> None:
        """Stops what runs of both."""
        await self.stop_scheduler()
        await self.lose_worker()
        if self._notifications:
            await asyncio.wait(self._notifications)

    async def start_scheduler(self, *, port: int | None = None) -> None:
        """Starts a scheduler that knows no sessions.

        Args:
            port: Its port; 0: a free one. None: the one before.
        """
        state = _fake_scheduler.SchedulerState(epoch=uuid.uuid4().hex)
        server = grpc.aio.server(options=_OPTIONS)
        agent_service_pb2_grpc.add_AgentServiceServicer_to_server(
            _fake_scheduler.AgentServicer(self, state), server
        )
        admin_service_pb2_grpc.add_AdminServiceServicer_to_server(
            _fake_scheduler.AdminServicer(self, state), server
        )
        wanted = self._scheduler_port if port is None else port
        self._scheduler_port = server.add_insecure_port(f"127.0.0.1:{wanted}")
        await server.start()
        self._scheduler = server

    async def stop_scheduler(self) -> None:
        """Stops the scheduler at once; its sessions are forgotten."""
        server, self._scheduler = self._scheduler, None
        if server is not None:
            await server.stop(grace=None)

    async def start_worker(self, *, port: int | None = None) -> None:
        """Starts a worker that knows no sessions.

        Args:
            port: Its port; 0: a free one. None: the one before.
        """
        self._worker_state = _fake_worker.WorkerState()
        server = grpc.aio.server(options=_OPTIONS)
        inference_service_pb2_grpc.add_InferenceServiceServicer_to_server(
            _fake_worker.InferenceServicer(self, self._worker_state), server
        )
        wanted = self._worker_port if port is None else port
        self._worker_port = server.add_insecure_port(f"127.0.0.1:{wanted}")
        await server.start()
        self._worker = server

    async def lose_worker(self) -> None:
        """Stops the worker at once, in the middle of whatever it does."""
        server, self._worker = self._worker, None
        if server is not None:
            await server.stop(grace=None)

    # --- what tests arrange ----------------------------------------------------------------------

    def add_reply(self, text: str) -> None:
        """Adds what the model says to the next context that it has not seen."""
        self.model.add(text)

    def fail(
        self,
        method: str,
        reason: str,
        message: str = "injected",
        *,
        times: int = 1,
        after_tokens: int | None = None,
        metadata: dict[str, str] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        """Makes the next calls of a method fail.

        Args:
            method: ``"Generate"``, ``"GetModel"``, ``"OpenSession"``, ``"SignalPhase"`` (streamed
                or not), ``"CloseSession"``, ``"EvictSession"``, ``"RestoreSession"`` or
                ``"DropSession"``.
            reason: The `reason` of the error, such as ``"ENGINE_LOST"``.
            message: Its message.
            times: How many calls fail.
            after_tokens: With Generate: fail in the middle, after so many tokens.
            metadata: The error's metadata.
            retry_after_s: When to retry, in seconds.

        Raises:
            ValueError: There is no such reason.
        """
        if reason not in REASONS:
            raise ValueError(f"{reason!r} is none of {', '.join(sorted(REASONS))}")
        error = FaultError(reason, message, metadata, retry_after_s)
        self._faults.setdefault(method, []).extend([Fault(error, after_tokens)] * times)

    def hold_tokens(self, after_tokens: int = 0) -> None:
        """Lets each generation make this many tokens and then wait for `release_tokens`."""
        self._held_at = after_tokens

    def release_tokens(self) -> None:
        """Lets held generations go on."""
        self._held_at = None
        self.notify()

    def forget(self, session_id: str) -> None:
        """Makes the worker forget a session, as one that was started anew has."""
        self._worker_state.logs.pop(session_id, None)
        self.notify()

    def worker_context(self, session_id: str) -> tuple[int, ...] | None:
        """Returns the worker's copy of a session's context; None if it knows no such session."""
        log = self._worker_state.logs.get(session_id)
        return None if log is None else tuple(log)

    def is_generating(self, session_id: str) -> bool:
        """Tells whether the worker runs a generation of a session."""
        return session_id in self._worker_state.generating

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Returns once a condition on the fake's state holds."""
        async with self._changed:
            await self._changed.wait_for(condition)

    # --- for the servicers -----------------------------------------------------------------------

    def notify(self) -> None:
        """Has `wait_until` look again; may be called from any thread."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._start_notifying)

    def _start_notifying(self) -> None:
        task = asyncio.create_task(self._notify())
        self._notifications.add(task)
        task.add_done_callback(self._notifications.discard)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def pass_gate(self, count: int) -> None:
        """Waits while generations are held and `count` tokens are enough."""
        if self._held_at is not None:
            await self.wait_until(lambda: self._held_at is None or count < self._held_at)

    def take_fault(self, method: str) -> Fault | None:
        """Returns the error that the next call of a method is to fail with."""
        faults = self._faults.get(method)
        return faults.pop(0) if faults else None

    def raise_fault(self, method: str) -> None:
        """Raises the error that the next call of a method is to fail with."""
        fault = self.take_fault(method)
        if fault is not None:
            raise fault.error

    def record_signal(
        self, signal: agent_service_pb2.SignalPhaseRequest, traceparent: str, *, streamed: bool
    ) -> None:
        """Takes note of a signal."""
        expected_s = None
        if signal.HasField("expected_duration"):
            expected_s = seconds_of(signal.expected_duration)
        self.signals.append(
            RecordedSignal(
                signal.session_id,
                phase_from_proto(signal.phase),
                signal.sequence,
                signal.tool_name,
                expected_s,
                traceparent,
                streamed,
            )
        )
        self.notify()

    def record_generate(
        self, request: inference_service_pb2.GenerateRequest, traceparent: str
    ) -> None:
        """Takes note of a Generate call."""
        append: str | tuple[int, ...] | tuple[tuple[str, str], ...] = ()
        kind = request.WhichOneof("append")
        if kind == "append_text":
            append = request.append_text
        elif kind == "append_chat":
            append = tuple((turn.role, turn.content) for turn in request.append_chat.turns)
        elif kind == "append_token_ids":
            append = tuple(request.append_token_ids.ids)
        has_length = request.HasField("expected_context_length")
        self.requests.append(
            RecordedGenerate(
                session_id=request.session_id,
                full_context=tuple(request.full_context.ids)
                if request.HasField("full_context")
                else None,
                expected_context_length=request.expected_context_length if has_length else None,
                append=append,
                max_tokens=request.max_tokens if request.HasField("max_tokens") else None,
                seed=request.sampling.seed if request.sampling.HasField("seed") else None,
                traceparent=traceparent,
            )
        )
        self.notify()

    def record_command(self, method: str, session_id: str) -> None:
        """Takes note of an admin command."""
        self.commands.append((method, session_id))
        self.notify()


@contextlib.contextmanager
def fake_server(
    replies: Iterable[str] = (),
    *,
    max_context_length: int = 4096,
    streams_phases: bool = True,
    page_size: int = 1000,
) -> Iterator[FakeServer]:
    """Runs a `FakeServer` in a thread of its own, for code without an event loop.

    Of its methods, those that are not ``async`` and its records may be used from other threads.

    Args:
        replies: As for `FakeServer`, like the others.
        max_context_length: The model's limit, in tokens.
        streams_phases: False refuses the stream of phases.
        page_size: Most sessions per page of ListSessions.
    """
    portal = Portal()
    try:
        server = portal.call_sync(
            lambda: FakeServer(
                replies,
                max_context_length=max_context_length,
                streams_phases=streams_phases,
                page_size=page_size,
            )
        )
        portal.call(server.start())
        try:
            yield server
        finally:
            portal.call(server.stop())
    finally:
        portal.close()
