"""The front process: starts the engine, serves, and drains."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import uuid
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from services.common.errors import (
    EngineLostError,
    SessionClosedError,
    UnknownSessionError,
    UnsupportedError,
)
from services.common.grpc_server import GrpcServer, serve
from services.common.http_metrics import MetricsServer
from services.common.model_files import ModelKind, model_folder, model_kind, tokenizer_source
from services.common.network import connectable_host, join_host_port
from services.common.telemetry import Telemetry, setup
from services.worker import messages
from services.worker.config import WorkerConfig
from services.worker.front import service, tokenizer
from services.worker.front.chat import ChatTemplate
from services.worker.front.control_client import ControlClient
from services.worker.front.convert.control import WorkerIdentity
from services.worker.front.engine_client import EngineClient, EngineTarget
from services.worker.front.generation import Generation
from services.worker.front.generator import Generator, ServedModel
from services.worker.front.metrics import WorkerMetrics
from services.worker.front.session_log import SessionLogs
from services.worker.front.spans import SpanRecorder

_logger = logging.getLogger(__name__)
_T = TypeVar("_T")

HOST_POOL_HEALTH = "djinn.worker.HostPool"
"""What the health service calls the host pool; it serves once all of it is pinned."""
ENGINE_STOP_TIMEOUT_S = 10.0
LAST_ANSWERS_S = 1.0
"""How long clients have at least to fetch the last of what was made for them, in seconds."""


async def run_front(
    config: WorkerConfig,
    engine_target: EngineTarget,
    stop: asyncio.Event,
    announce: Callable[[str], None],
) -> int:
    """Runs a worker until `stop` is set or its engine ends.

    Args:
        config: The worker's configuration.
        engine_target: What the engine process runs.
        stop: Set to drain and end.
        announce: Told the address, once, when the worker serves.

    Returns:
        The exit code: 0 after `stop`, 1 if the engine was lost.

    Raises:
        ConfigError: The worker cannot start as configured.
    """
    telemetry = setup("djinn-worker", config.telemetry, config.worker_id)
    try:
        return await Front(config, engine_target, telemetry).run(stop, announce)
    finally:
        await asyncio.to_thread(telemetry.shutdown)


class Front:
    """The parts of a front process, and the order in which they live and die."""

    def __init__(
        self, config: WorkerConfig, engine_target: EngineTarget, telemetry: Telemetry
    ) -> None:
        """Makes the parts that need nothing from the engine."""
        self._config = config
        self._logs = SessionLogs()
        self._spans = SpanRecorder(telemetry, config.engine.model)
        self._metrics = WorkerMetrics(config.worker_id, config.engine.model)
        self._service = service.InferenceService(config.worker_id, self._metrics, self._spans)
        self._engine = EngineClient(config.engine, engine_target)
        self._engine.add_listener(self)
        self._server: GrpcServer | None = None
        self._generator: Generator | None = None
        self._control: ControlClient | None = None
        self._host_blocks: int | None = None
        self._drain_until = 0.0

    async def run(self, stop: asyncio.Event, announce: Callable[[str], None]) -> int:
        """See `run_front`."""
        config = self._config
        # Before minutes are spent on loading a model.
        if model_kind(config.engine.model) is ModelKind.FOLDER:
            model_folder(config.engine.model)
        async with contextlib.AsyncExitStack() as cleanup:
            # It answers UNAVAILABLE, and its health NOT_SERVING, until the engine is ready.
            self._server = await serve(
                [(service.register, self._service)],
                [service.NAME],
                config.host,
                config.port,
                serving=False,
                parts=[HOST_POOL_HEALTH],
            )
            cleanup.push_async_callback(self._stop_server, self._server)
            metrics_server = MetricsServer(
                self._metrics.registry,
                self._metrics.vmu,
                config.host,
                config.metrics_port,
                healthy=lambda: self._engine.alive,
            )
            cleanup.push_async_callback(metrics_server.stop)
            await metrics_server.start()
            cleanup.push_async_callback(self._engine.stop, ENGINE_STOP_TIMEOUT_S)
            await self._engine.start()

            ready = await self._unless(stop, self._engine.wait_ready())
            if ready is None:
                return 0
            model = await asyncio.to_thread(load_model, config.engine.model, ready)
            self._metrics.on_ready(ready)
            self._host_blocks = ready.host_blocks
            self._generator = Generator(self._engine, self._logs, model)
            # What lives now lives to the end: never look through it again for garbage.
            gc.collect()
            gc.freeze()
            self._service.open(self._generator)
            self._server.set_serving(True)
            if config.scheduler is not None:
                identity = self._identity(self._server, metrics_server)
                self._control = ControlClient(
                    config.scheduler,
                    identity,
                    model,
                    self._engine.send,
                    self._on_command_over,
                )
                control = asyncio.create_task(self._control.run(), name="control-stream")
                cleanup.push_async_callback(_cancel, control)
            announce(self._server.address)

            lost = await self._unless(stop, self._engine.wait_lost())
            if lost is not None:
                self._server.set_serving(False)
                _logger.error("%s: the worker ends", lost.message)
                return 1
            return await self._drain()

    def _identity(self, server: GrpcServer, metrics_server: MetricsServer) -> WorkerIdentity:
        host = connectable_host(self._config.host)
        if self._config.advertised_endpoint is None and host != self._config.host:
            _logger.warning(
                "clients are told to connect to %s, which only this host can: set --advertise", host
            )
        return WorkerIdentity(
            worker_id=self._config.worker_id,
            incarnation_id=uuid.uuid4().hex,
            endpoint=self._config.advertised_endpoint or join_host_port(host, server.port),
            metrics_endpoint=join_host_port(host, metrics_server.port),
        )

    async def _stop_server(self, server: GrpcServer) -> None:
        """Ends the server once clients have the last of what was made for them."""
        left_s = self._drain_until - asyncio.get_running_loop().time()
        await server.stop(max(left_s, LAST_ANSWERS_S))

    async def _drain(self) -> int:
        """Lets running requests end, for as long as the configuration gives them."""
        assert self._server is not None
        assert self._generator is not None
        self._server.set_serving(False)
        self._generator.drain()
        if self._control is not None:
            self._control.drain()
        self._drain_until = asyncio.get_running_loop().time() + self._config.drain_timeout_s
        _logger.info("draining: %d requests are running", self._engine.running)
        try:
            async with asyncio.timeout(self._config.drain_timeout_s):
                await self._engine.wait_idle()
        except TimeoutError:
            _logger.warning("%d requests did not end in time", self._engine.running)
        except EngineLostError as lost:
            _logger.error("%s", lost.message)
            return 1
        return 0

    @staticmethod
    async def _unless(stop: asyncio.Event, awaited: Coroutine[Any, Any, _T]) -> _T | None:
        """Returns what `awaited` gives, or None if `stop` is set first."""
        wanted = asyncio.ensure_future(awaited)
        stopped = asyncio.ensure_future(stop.wait())
        try:
            await asyncio.wait([wanted, stopped], return_when=asyncio.FIRST_COMPLETED)
            return wanted.result() if wanted.done() else None
        finally:
            for task in (wanted, stopped):
                task.cancel()
            await asyncio.gather(wanted, stopped, return_exceptions=True)

    # --- what the engine does ---

    def on_command_done(self, done: messages.CommandDone) -> None:
        """A command has ended."""
        if self._control is not None:
            self._control.on_command_done(done)

    def on_session_event(self, event: messages.SessionEvent) -> None:
        """A session has changed."""
        session = event.session
        if event.kind is messages.SessionEventKind.GENERATE_FINISHED:
            self._logs.ensure(session.session_id).cut(session.context_length)
        if self._control is not None:
            self._control.on_session_event(event)

    def on_snapshot(self, snapshot: messages.Snapshot) -> None:
        """Every session, for the control stream."""
        if self._control is not None:
            self._control.on_snapshot(snapshot)

    def on_report(self, report: messages.Report) -> None:
        """The engine has reported."""
        self._metrics.on_report(report)
        if self._host_blocks is not None and report.host.total >= self._host_blocks:
            assert self._server is not None
            self._server.set_ready(HOST_POOL_HEALTH)
        if self._control is not None:
            self._control.on_report(report)

    def on_generation_over(self, generation: Generation) -> None:
        """A request is over."""
        if isinstance(generation.error, UnknownSessionError | SessionClosedError):
            self._logs.forget(generation.submit.session_id)
        self._metrics.on_generation_over(generation)
        self._spans.generation(generation, generation.trace)

    def _on_command_over(
        self, command: messages.Command, traceparent: str, done: messages.CommandDone
    ) -> None:
        if isinstance(command.action, messages.Close) and done.error is None:
            self._logs.forget(command.session_id)
        self._spans.command(command, traceparent, done)


def load_model(name: str, ready: messages.Ready) -> ServedModel:
    """Returns what is served, with the tokenizer and template that the model has.

    Args:
        name: As in ``--model``.
        ready: What the engine says of it.

    Raises:
        ConfigError: The model's tokenizer cannot be read.
    """
    source = tokenizer_source(name)
    if source is None:
        return ServedModel(name, ready)
    folder = tokenizer.local_folder(source)
    text = tokenizer.load(folder)
    chat: ChatTemplate | None = None
    with contextlib.suppress(UnsupportedError):
        chat = ChatTemplate(text)
        if not chat.can_continue():
            chat = None
    return ServedModel(name, ready, tokenizer.eos_token_ids(folder), text, chat)


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
