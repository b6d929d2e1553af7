"""How the phases of all sessions of a client reach the scheduler.

One bidirectional stream carries the signals of all sessions, so that a signal costs one message
and no new call. A signal is kept until it is answered or a newer one of its session replaces it;
when the stream breaks, the newest of every session is said again on the next one, with its old
sequence number, which makes the repetition harmless. Where something in between does not let
streams through, each signal is a call of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import replace

import grpc
import grpc.aio
from opentelemetry import trace

from djinn.v1 import agent_service_pb2, agent_service_pb2_grpc
from djinn_client import _tracing
from djinn_client._errors import (
    ConnectError,
    DeadlineExceededError,
    DjinnError,
    UnavailableError,
    error_from_rpc,
    error_from_status,
)
from djinn_client._retry import Backoff, RetryPolicy
from djinn_client._types import Phase

_log = logging.getLogger("djinn_client")

_Call = grpc.aio.StreamStreamCall[
    agent_service_pb2.StreamPhasesRequest, agent_service_pb2.StreamPhasesResponse
]


class Signal:
    """One signal on its way; its outcome once `answered` is set."""

    def __init__(
        self, request: agent_service_pb2.SignalPhaseRequest, phase: Phase, span: trace.Span
    ) -> None:
        self.request = request
        self.phase = phase
        self.span = span
        self.traceparent = _tracing.traceparent_of(span)
        self.answered = asyncio.Event()
        self.error: DjinnError | None = None
        self.written_at = math.inf

    def finish(self, error: DjinnError | None = None) -> None:
        """Ends it, once: answered, refused or replaced by a newer one."""
        if self.answered.is_set():
            return
        self.error = error
        if error is not None:
            _tracing.fail(self.span, error)
        self.span.end()
        self.answered.set()


class PhaseSignal:
    """A signal that has been sent; awaiting it waits for the scheduler's answer.

    The wait is bounded, and an unreachable scheduler is no error: the signal is repeated in the
    background until it is answered or a newer one replaces it, and the worker needs no signal to
    be right. COMPUTE is never waited for, since the next generation is what matters.
    """

    def __init__(self, signal: Signal, patience_s: float) -> None:
        self._signal = signal
        self._patience_s = patience_s

    def __await__(self) -> Generator[None, None, None]:
        return self._wait().__await__()

    async def _wait(self) -> None:
        if self._signal.phase is Phase.COMPUTE:
            return
        try:
            async with asyncio.timeout(self._patience_s):
                await self._signal.answered.wait()
        except TimeoutError:
            _log.warning(
                "session %s: %s has not reached the scheduler yet; it is repeated",
                self._signal.request.session_id,
                self._signal.phase,
            )
            return
        if self._signal.error is not None:
            raise self._signal.error


class PhaseSender:
    """Sends the signals of all sessions of a client.

    Args:
        stub: The scheduler's service.
        target: Its host:port, for messages.
        retry: The pauses between tries; a signal itself is never given up.
        answer_timeout_s: After so long without an answer the stream is taken for dead.
        on_answer: Called with each successful answer.
    """

    def __init__(
        self,
        stub: agent_service_pb2_grpc.AgentServiceAsyncStub,
        target: str,
        retry: RetryPolicy,
        *,
        answer_timeout_s: float,
        on_answer: Callable[[str, agent_service_pb2.SignalPhaseResponse], None],
    ) -> None:
        self._stub = stub
        self._target = target
        self._retry = replace(retry, give_up_s=math.inf)
        self._answer_timeout_s = answer_timeout_s
        self._on_answer = on_answer
        self._latest: dict[str, Signal] = {}
        self._queue: deque[Signal] = deque()
        self._in_flight: dict[tuple[str, int], Signal] = {}
        self._wake = asyncio.Event()
        self._unary = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Opens the stream ahead of the first signal."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="djinn phase signals")
            self._task.add_done_callback(self._on_end)

    def post(self, signal: Signal) -> None:
        """Sends a signal as soon as possible and until it is answered."""
        self._latest[signal.request.session_id] = signal
        self._queue.append(signal)
        self.start()
        self._wake.set()

    async def forget(self, session_id: str, patience_s: float) -> None:
        """Sends no more signals of a session that ends, and lets those under way arrive.

        A signal that overtook its session's end would open the session again, by its token.

        Args:
            session_id: The session.
            patience_s: Most seconds to wait for answers.
        """
        self._latest.pop(session_id, None)
        for signal in [s for s in self._queue if s.request.session_id == session_id]:
            self._queue.remove(signal)
            signal.finish()
        under_way = [s for (owner, _), s in self._in_flight.items() if owner == session_id]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                for signal in under_way:
                    await signal.answered.wait()

    def say_again(self) -> None:
        """Says the newest signal of every session once more: the scheduler may not know it."""
        queued = {id(signal) for signal in self._queue}
        self._queue.extend(s for s in self._latest.values() if id(s) not in queued)
        self._wake.set()

    async def aclose(self) -> None:
        """Ends the stream; what has not been answered is lost."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        for signal in [*self._latest.values(), *self._queue, *self._in_flight.values()]:
            signal.finish()

    async def _run(self) -> None:
        backoff = Backoff(self._retry)
        while True:
            try:
                if self._unary:
                    await self._serve_unary()
                else:
                    await self._serve_stream(backoff)
                error: DjinnError = ConnectError(f"{self._target} ended the stream of phases")
            except grpc.aio.AioRpcError as failure:
                if failure.code() is grpc.StatusCode.UNIMPLEMENTED:
                    _log.info(
                        "%s takes no stream of phases: signals are single calls", self._target
                    )
                    self._unary = True
                error = error_from_rpc(failure, self._target)
            except TimeoutError:
                error = DeadlineExceededError(f"{self._target} does not answer signals")
            _log.debug("phase signals: %s", error.message)
            await backoff.pause(error)
            self._requeue()

    def _on_end(self, task: asyncio.Task[None]) -> None:
        """Prepares for another start, with the next signal, after an end that is a bug."""
        if task.cancelled():
            return
        _log.error(
            "a bug ended the sending of phase signals; it starts anew with the next signal",
            exc_info=task.exception(),
        )
        self._task = None
        self._requeue()

    def _requeue(self) -> None:
        """Queues for a new stream what the old one may have lost: the newest of each session."""
        for signal in [*self._queue, *self._in_flight.values()]:
            if self._latest.get(signal.request.session_id) is not signal:
                signal.finish()
        self._in_flight.clear()
        self._queue = deque(self._latest.values())
        self._wake.set()

    # --- as a stream -----------------------------------------------------------------------------

    async def _serve_stream(self, backoff: Backoff) -> None:
        call = self._stub.StreamPhases()
        reader = asyncio.create_task(self._read_answers(call, backoff))
        try:
            # The call may end while it is written to: its reader knows why.
            with contextlib.suppress(asyncio.InvalidStateError):
                while not reader.done():
                    await self._write_queued(call)
                    await self._wait_for_work(reader)
            await reader
        finally:
            call.cancel()
            reader.cancel()
            await asyncio.wait([reader])
            if not reader.cancelled():
                reader.exception()  # Seen above, or of no interest any more.

    async def _write_queued(self, call: _Call) -> None:
        while self._queue:
            signal = self._queue.popleft()
            key = (signal.request.session_id, signal.request.sequence)
            self._in_flight[key] = signal
            signal.written_at = time.monotonic()
            await call.write(
                agent_service_pb2.StreamPhasesRequest(
                    signal=signal.request, traceparent=signal.traceparent
                )
            )

    async def _wait_for_work(self, reader: asyncio.Task[None]) -> None:
        """Returns when there is something to write or the stream has ended.

        Raises:
            TimeoutError: A signal has gone unanswered for too long.
        """
        self._wake.clear()
        if self._queue:
            return
        oldest = min((s.written_at for s in self._in_flight.values()), default=math.inf)
        patience_s = None
        if oldest < math.inf:
            patience_s = max(0.0, oldest + self._answer_timeout_s - time.monotonic())
        work = asyncio.create_task(self._wake.wait())
        try:
            done, _ = await asyncio.wait(
                {work, reader}, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            work.cancel()
        if not done and any(s.written_at == oldest for s in self._in_flight.values()):
            raise TimeoutError

    async def _read_answers(self, call: _Call, backoff: Backoff) -> None:
        async for message in call:
            backoff.progress()
            signal = self._in_flight.pop((message.session_id, message.sequence), None)
            if message.HasField("error"):
                self._refused(signal, error_from_status(message.error))
                continue
            if signal is not None:
                signal.finish()
            self._on_answer(message.session_id, message.response)

    def _refused(self, signal: Signal | None, error: DjinnError) -> None:
        if signal is None:
            return
        if isinstance(error, UnavailableError):
            pause_s = error.retry_after_s or self._retry.max_s
            asyncio.get_running_loop().call_later(pause_s, self._repeat, signal)
            return
        self._log_refusal(signal, error)
        signal.finish(error)

    def _repeat(self, signal: Signal) -> None:
        if self._latest.get(signal.request.session_id) is signal:
            self._queue.append(signal)
            self._wake.set()
        else:
            signal.finish()

    def _log_refusal(self, signal: Signal, error: DjinnError) -> None:
        _log.warning(
            "session %s: the scheduler refused %s: %s",
            signal.request.session_id,
            signal.phase,
            error.message,
        )

    # --- as single calls -------------------------------------------------------------------------

    async def _serve_unary(self) -> None:
        async with asyncio.TaskGroup() as calls:
            while True:
                while self._queue:
                    calls.create_task(self._say(self._queue.popleft()))
                self._wake.clear()
                await self._wake.wait()

    async def _say(self, signal: Signal) -> None:
        session_id = signal.request.session_id
        backoff = Backoff(self._retry)
        while True:
            try:
                answer = await self._stub.SignalPhase(
                    signal.request,
                    timeout=self._answer_timeout_s,
                    metadata=tuple(_tracing.headers_of(signal.span).items()),
                )
            except grpc.aio.AioRpcError as failure:
                error = error_from_rpc(failure, self._target)
                if not isinstance(error, UnavailableError | DeadlineExceededError):
                    self._log_refusal(signal, error)
                    signal.finish(error)
                    return
            else:
                signal.finish()
                self._on_answer(session_id, answer)
                return
            await backoff.pause(error)
            if self._latest.get(session_id) is not signal:
                signal.finish()
                return
