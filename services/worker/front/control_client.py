"""The worker's side of the control stream: dials the scheduler, for ever.

Each stream begins with everything the engine holds, so a scheduler that was restarted, or that
missed what happened meanwhile, knows it all again. While there is none, the worker serves on, in
the mode that the last Welcome told.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import grpc

from djinn.v1 import control_service_pb2 as pb
from djinn.v1 import control_service_pb2_grpc as pb_grpc
from services.common.errors import InvalidRequestError
from services.common.grpc_server import CHANNEL_OPTIONS
from services.worker import messages
from services.worker.front.commands import CommandDesk
from services.worker.front.convert import control as convert
from services.worker.front.generator import ServedModel

_logger = logging.getLogger(__name__)

HANDSHAKE_TIMEOUT_S = 10.0
DEFAULT_REPORT_INTERVAL_S = 1.0
MIN_REPORT_INTERVAL_S = 0.01
MAX_OUTBOX = 50_000
"""Messages that may wait for the scheduler; beyond it a new stream's snapshot is shorter."""
MAX_STEPS_BETWEEN_REPORTS = 4096

_Stream = grpc.aio.StreamStreamCall[pb.ConnectRequest, pb.ConnectResponse]


@dataclass(frozen=True, slots=True)
class Backoff:
    """How long to wait between attempts.

    Attributes:
        first_s: Before the second attempt.
        factor: Growth from one attempt to the next.
        max_s: The longest.
    """

    first_s: float = 0.1
    factor: float = 2.0
    max_s: float = 5.0

    def delay_s(self, failures: int) -> float:
        """Returns how long to wait after so many failures in a row, at least 1.

        Half of it is chance, so that the workers of a scheduler that was restarted do not all come
        back at once.
        """
        longest = self.first_s
        for _ in range(failures - 1):
            longest = min(longest * self.factor, self.max_s)
            if longest >= self.max_s:
                break
        return longest * random.uniform(0.5, 1.0)


class _StreamLostError(Exception):
    """The stream has ended; says why in a few words."""


class ControlClient:
    """Keeps a control stream to the scheduler; listens to the engine for what goes up it."""

    def __init__(
        self,
        address: str,
        identity: convert.WorkerIdentity,
        model: ServedModel,
        send: Callable[[messages.ToEngine], None],
        on_command_over: Callable[[messages.Command, str, messages.CommandDone], None],
        backoff: Backoff | None = None,
    ) -> None:
        """Prepares; `run` dials.

        Args:
            address: host:port of the scheduler.
            identity: Who the worker says it is.
            model: What it serves.
            send: Sends a message to the engine.
            on_command_over: Told each command that the engine has ended, and what caused it.
            backoff: How long to wait between attempts.
        """
        self._address = address
        self._identity = identity
        self._model = model
        self._send_engine = send
        self._on_command_over = on_command_over
        self._backoff = backoff or Backoff()
        self._desk = CommandDesk(send, self._send_result)
        self._draining = False
        self._restart = asyncio.Event()
        self._connected = asyncio.Event()
        self._snapshot_ids = itertools.count(1)
        self._snapshot: asyncio.Future[messages.Snapshot] | None = None
        self._snapshot_id = 0
        # What waits to be sent up the stream; None while there is none.
        self._outbox: deque[pb.ConnectRequest] | None = None
        self._outbox_filled = asyncio.Event()
        self._report: messages.Report | None = None
        self._step_seconds: deque[float] = deque(maxlen=MAX_STEPS_BETWEEN_REPORTS)

    @property
    def connected(self) -> bool:
        """True while the scheduler has welcomed the worker."""
        return self._connected.is_set()

    def drain(self) -> None:
        """Tells the scheduler, by a new Hello, that no new sessions are taken."""
        self._draining = True
        self._restart.set()

    async def run(self) -> None:
        """Keeps a stream up until cancelled."""
        failures = 0
        while True:
            self._restart.clear()
            try:
                await self._keep_stream()
            except (_StreamLostError, grpc.aio.AioRpcError, TimeoutError) as error:
                if self._connected.is_set():
                    failures = 0
                    _logger.warning("lost the scheduler at %s: %s", self._address, _why(error))
                elif failures == 0:
                    _logger.warning(
                        "no scheduler at %s yet (%s): serving without it, and trying on",
                        self._address,
                        _why(error),
                    )
            finally:
                self._connected.clear()
                self._outbox = None
            if not self._restart.is_set():
                failures += 1
                await self._pause(self._backoff.delay_s(failures))

    async def _pause(self, delay_s: float) -> None:
        try:
            async with asyncio.timeout(delay_s):
                await self._restart.wait()
        except TimeoutError:
            pass

    # --- what the engine does ---

    def on_command_done(self, done: messages.CommandDone) -> None:
        """A command has ended."""
        known = self._desk.done(done)
        if known is not None:
            self._on_command_over(*known, done)

    def on_session_event(self, event: messages.SessionEvent) -> None:
        """A session has changed."""
        if self._outbox is not None:  # without a stream it is not even worth converting
            self._put(convert.session_event(event))

    def on_snapshot(self, snapshot: messages.Snapshot) -> None:
        """What was asked for at the start of a stream."""
        waiting = self._snapshot
        if waiting is None or waiting.done() or snapshot.snapshot_id != self._snapshot_id:
            return
        waiting.set_result(snapshot)
        # Events from here on are later than the snapshot, and go up behind it.
        self._outbox = deque()

    def on_report(self, report: messages.Report) -> None:
        """The engine has reported."""
        self._report = report
        self._step_seconds.extend(report.step_seconds)

    # --- one stream ---

    async def _keep_stream(self) -> None:
        """Connects and serves one stream.

        Raises:
            _StreamLostError: It has ended.
            grpc.aio.AioRpcError: It has failed.
            TimeoutError: The scheduler or the engine did not answer in time.
        """
        async with grpc.aio.insecure_channel(self._address, options=CHANNEL_OPTIONS) as channel:
            # Asking the engine for a snapshot is not for nothing, so first see who is there.
            async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                await _connected(channel)
            call = pb_grpc.WorkerControlServiceStub(channel).Connect()
            try:
                async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                    interval_s = await self._handshake(call)
                await self._first_to_end(
                    self._receive(call),
                    self._transmit(call),
                    self._report_regularly(interval_s),
                    self._wait_restart(),
                )
            finally:
                call.cancel()

    async def _handshake(self, call: _Stream) -> float:
        """Says Hello; returns the interval of reports in seconds."""
        self._snapshot = asyncio.get_running_loop().create_future()
        self._snapshot_id = next(self._snapshot_ids)
        self._send_engine(messages.GetSnapshot(self._snapshot_id))
        snapshot = await self._snapshot
        hello = convert.hello(
            self._identity, self._model, snapshot.sessions, draining=self._draining
        )
        await call.write(hello)
        answer = await _read(call)
        if answer is None:
            raise _StreamLostError("it ended the stream without a Welcome")
        if answer.WhichOneof("message") != "welcome":
            raise _StreamLostError("it answered Hello with something else than Welcome")
        self._send_engine(convert.set_mode(answer.welcome))
        self._connected.set()
        _logger.info(
            "connected to the scheduler at %s (epoch %s) with %d sessions",
            self._address,
            answer.welcome.scheduler_epoch,
            len(snapshot.sessions),
        )
        interval_s = answer.welcome.report_interval.ToNanoseconds() / 1e9
        return max(interval_s or DEFAULT_REPORT_INTERVAL_S, MIN_REPORT_INTERVAL_S)

    async def _receive(self, call: _Stream) -> None:
        while (received := await _read(call)) is not None:
            if received.WhichOneof("message") == "command":
                self._take(received.command)
        raise _StreamLostError("it ended the stream")

    def _take(self, command: pb.Command) -> None:
        received_ns = time.time_ns()
        self._put(convert.ack(command.command_id))
        if self._desk.repeat(command.command_id):
            return
        try:
            checked = convert.command(command, received_ns)
        except InvalidRequestError as error:
            self._desk.refuse(command.command_id, command.session_id, error)
            return
        self._desk.take(checked, command.traceparent)

    async def _transmit(self, call: _Stream) -> None:
        while True:
            await self._outbox_filled.wait()
            self._outbox_filled.clear()
            while self._outbox:
                await call.write(self._outbox.popleft())

    async def _report_regularly(self, interval_s: float) -> None:
        while True:
            if self._report is not None:
                steps = list(self._step_seconds)
                self._step_seconds.clear()
                self._put(convert.memory_report(self._report, steps))
            await asyncio.sleep(interval_s)

    async def _wait_restart(self) -> None:
        await self._restart.wait()

    @staticmethod
    async def _first_to_end(*parts: Awaitable[None]) -> None:
        """Runs all of them until one ends, and raises what that one raised."""
        tasks = [asyncio.ensure_future(part) for part in parts]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _send_result(self, done: messages.CommandDone) -> None:
        # Without a stream it is remembered, and told if the command is repeated on the next one.
        self._put(convert.result(done))

    def _put(self, message: pb.ConnectRequest) -> None:
        if self._outbox is None:
            return
        if len(self._outbox) >= MAX_OUTBOX:
            _logger.warning("the scheduler at %s leaves messages unread", self._address)
            self._outbox = None
            self._restart.set()
            return
        self._outbox.append(message)
        self._outbox_filled.set()


async def _read(call: _Stream) -> pb.ConnectResponse | None:
    """Returns the next message; None at the stream's end."""
    received = await call.read()
    return received if isinstance(received, pb.ConnectResponse) else None


async def _connected(channel: grpc.aio.Channel) -> None:
    """Waits until a channel has a connection; raises `_StreamLostError` once it cannot get one."""
    state = channel.get_state(try_to_connect=True)
    while state is not grpc.ChannelConnectivity.READY:
        if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
            raise _StreamLostError("connection refused or no such host")
        await channel.wait_for_state_change(state)
        state = channel.get_state(try_to_connect=True)


def _why(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return str(error)
