"""The workers' control streams: one reader and one writer task each."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from djinn.v1 import control_service_pb2 as control_pb
from djinn.v1 import control_service_pb2_grpc as control_grpc
from services.common.errors import DjinnError, InvalidRequestError, UnavailableError
from services.scheduler.convert import workers as convert
from services.scheduler.coordinator import Coordinator
from services.scheduler.domain import Command, name_of
from services.scheduler.metrics import Metrics
from services.scheduler.registry import WorkerState

add_to_server = control_grpc.add_WorkerControlServiceServicer_to_server

_logger = logging.getLogger(__name__)

# A worker this many messages behind reads nothing any more.
MAX_QUEUED = 50_000


class ControlLink:
    """The send queue of one worker's stream."""

    def __init__(self, clock: Callable[[], float], metrics: Metrics) -> None:
        self._clock = clock
        self._metrics = metrics
        self._queue: deque[tuple[control_pb.ConnectResponse, str, float | None]] = deque()
        self._wake = asyncio.Event()
        self._closed: str | None = None

    @property
    def closed(self) -> str | None:
        """Why the stream is to end; None while it goes on."""
        return self._closed

    def send(self, command: Command, caused_s: float | None) -> None:
        """Queues a command."""
        self.push(convert.to_command(command, self._clock()), name_of(command.action), caused_s)

    def push(self, message: control_pb.ConnectResponse, name: str, caused_s: float | None) -> None:
        """Queues a message; the writer takes it in the event loop's next turn."""
        if self._closed is None:
            self._queue.append((message, name, caused_s))
            self._wake.set()
            if len(self._queue) > MAX_QUEUED:
                self.close(f"{len(self._queue)} messages were not read")

    def close(self, reason: str) -> None:
        """Ends the stream, saying why; what is queued is lost."""
        if self._closed is None:
            self._closed = reason
            self._queue.clear()
            self._wake.set()

    async def write(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """Writes what is queued to the stream until the link is closed."""
        while self._closed is None:
            while self._queue:
                message, name, caused_s = self._queue.popleft()
                await context.write(message)
                self._metrics.command_sent(
                    name, self._clock() - caused_s if caused_s is not None else None
                )
            self._wake.clear()
            if not self._queue and self._closed is None:
                await self._wake.wait()


class ControlService(control_grpc.WorkerControlServiceServicer):
    """Serves the workers.

    Args:
        coordinator: What acts on what they say.
        clock: The time.
        metrics: Counts commands.
        on_change: Called after each message, for whoever keeps the timers.
        on_connect: Called when a worker has connected.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        clock: Callable[[], float],
        metrics: Metrics,
        *,
        on_change: Callable[[], None],
        on_connect: Callable[[], None],
    ) -> None:
        self._coordinator = coordinator
        self._clock = clock
        self._metrics = metrics
        self._on_change = on_change
        self._on_connect = on_connect
        self._links: set[ControlLink] = set()

    def close(self, reason: str) -> None:
        """Ends every stream."""
        for link in list(self._links):
            link.close(reason)

    async def Connect(  # type: ignore[override] # the kind of handler that writes itself
        self,
        request_iterator: AsyncIterator[control_pb.ConnectRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> None:
        """Talks to one worker until either end has had enough."""
        first = await anext(aiter(request_iterator), None)
        if first is None or first.WhichOneof("message") != "hello":
            raise InvalidRequestError.of_field("message", "the first on a stream must be Hello")
        hello = convert.hello(first.hello)
        config = self._coordinator.config
        link = ControlLink(self._clock, self._metrics)
        self._links.add(link)
        mode = self._coordinator.policy.worker_mode
        welcome = convert.to_welcome(self._coordinator.epoch, config.report_interval_s, mode)
        link.push(welcome, "welcome", None)
        worker = self._coordinator.workers.connected(hello, link, self._clock())
        _logger.info(
            "worker %s (%s) connected with %d sessions",
            hello.worker_id,
            hello.endpoint,
            len(hello.snapshot),
        )
        self._on_connect()
        self._on_change()
        reader = asyncio.create_task(self._read(request_iterator, worker))
        writer = asyncio.create_task(link.write(context))
        try:
            await asyncio.wait({reader, writer}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._links.discard(link)
            self._coordinator.workers.lost(hello.worker_id, link, self._clock())
            self._on_change()
            for task in (reader, writer):
                task.cancel()
            outcomes = await asyncio.gather(reader, writer, return_exceptions=True)
            _logger.info("worker %s: stream ended%s", hello.worker_id, _why(link))
        if link.closed is not None:
            raise UnavailableError(link.closed)
        for outcome in outcomes:
            if isinstance(outcome, Exception) and not _is_broken_stream(outcome):
                raise outcome

    async def _read(
        self, messages: AsyncIterator[control_pb.ConnectRequest], worker: WorkerState
    ) -> None:
        async for message in messages:
            try:
                self._take(message, worker)
            except DjinnError as error:
                _logger.warning("worker %s: %s", worker.hello.worker_id, error.message)
            self._on_change()

    def _take(self, message: control_pb.ConnectRequest, worker: WorkerState) -> None:
        now_s = self._clock()
        events = self._coordinator.workers
        events.heard(worker, now_s)
        match message.WhichOneof("message"):
            case "ack":
                # That the worker lives is all it says here; a result follows.
                return
            case "result":
                result = convert.result(message.result)
                self._metrics.command_ended(result)
                events.ended(result, now_s)
            case "session_event":
                event = convert.event(message.session_event)
                if event is not None:
                    events.happened(worker, event, now_s)
            case "memory_report":
                events.reported(worker, convert.report(message.memory_report))
            case "hello":
                raise InvalidRequestError.of_field("message", "a second Hello on one stream")
            case _:
                # A newer worker may say what this scheduler has no use for.
                return


def _why(link: ControlLink) -> str:
    return f": {link.closed}" if link.closed else ""


def _is_broken_stream(error: Exception) -> bool:
    # What gRPC raises on a stream whose other end is gone.
    return isinstance(error, grpc.RpcError | grpc.aio.UsageError | asyncio.InvalidStateError)
