"""The scheduler's process, put together."""

from __future__ import annotations

import asyncio
import gc
import logging

from services.common.grpc_server import GrpcServer, serve
from services.common.http_metrics import MetricsServer
from services.common.telemetry import Telemetry
from services.scheduler import admin, control, service
from services.scheduler.admin import AdminService
from services.scheduler.clock import Clock
from services.scheduler.config import SchedulerConfig
from services.scheduler.control import ControlService
from services.scheduler.coordinator import Coordinator
from services.scheduler.metrics import Metrics, SystemCollector, vmu
from services.scheduler.service import AgentService, WorkerArrivals

_logger = logging.getLogger(__name__)

NAMES = (
    "djinn.v1.AgentService",
    "djinn.v1.WorkerControlService",
    "djinn.v1.AdminService",
)


class Alarm:
    """Calls `Coordinator.advance` when it is due."""

    def __init__(self, coordinator: Coordinator, clock: Clock) -> None:
        self._coordinator = coordinator
        self._clock = clock
        self._handle: asyncio.TimerHandle | None = None
        self._due_s = float("inf")

    def arm(self) -> None:
        """Sees to it that the next thing due is not missed; cheap if nothing has become earlier."""
        due_s = self._coordinator.next_due_s()
        if due_s >= self._due_s:
            return
        if self._handle is not None:
            self._handle.cancel()
        self._due_s = due_s
        delay_s = max(0.0, due_s - self._clock())
        self._handle = asyncio.get_running_loop().call_later(delay_s, self._ring)

    def stop(self) -> None:
        """Rings no more."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _ring(self) -> None:
        self._handle = None
        self._due_s = float("inf")
        try:
            self._coordinator.advance(self._clock())
        finally:
            # A bug in one session's decision must not stop the clock for all.
            self.arm()


class Scheduler:
    """A scheduler that serves; `start` makes one.

    Attributes:
        coordinator: Its state.
        grpc: Its gRPC server.
        metrics: Its HTTP server.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        grpc_server: GrpcServer,
        metrics: MetricsServer,
        agents: AgentService,
        control: ControlService,
        alarm: Alarm,
    ) -> None:
        self.coordinator = coordinator
        self.grpc = grpc_server
        self.metrics = metrics
        self._agents = agents
        self._control = control
        self._alarm = alarm

    @classmethod
    async def start(cls, config: SchedulerConfig, telemetry: Telemetry) -> Scheduler:
        """Starts serving.

        Raises:
            ConfigError: A port is taken, or there is no such policy.
        """
        clock = Clock()
        coordinator = Coordinator(config, clock())
        counts = Metrics()
        counts.registry.register(SystemCollector(coordinator, clock))
        alarm = Alarm(coordinator, clock)
        arrivals = WorkerArrivals()
        tracer = telemetry.tracer(__name__)
        workers = ControlService(
            coordinator, clock, counts, on_change=alarm.arm, on_connect=arrivals.notify
        )
        agents = AgentService(coordinator, clock, tracer, counts, arrivals, on_change=alarm.arm)
        operators = AdminService(coordinator, clock, tracer, on_change=alarm.arm)
        metrics = MetricsServer(
            counts.registry,
            lambda: vmu(coordinator, clock()),
            config.host,
            config.metrics_port,
            healthy=lambda: not coordinator.draining,
        )
        await metrics.start()
        try:
            server = await serve(
                [
                    (service.add_to_server, agents),
                    (control.add_to_server, workers),
                    (admin.add_to_server, operators),
                ],
                NAMES,
                config.host,
                config.port,
            )
        except BaseException:
            await metrics.stop()
            raise
        alarm.arm()
        return cls(coordinator, server, metrics, agents, workers, alarm)

    @property
    def address(self) -> str:
        """``host:port`` of the gRPC services."""
        return self.grpc.address

    async def stop(self) -> None:
        """Takes no new sessions, lets calls end, ends the workers' streams, and stops."""
        _logger.info("draining")
        self.coordinator.draining = True
        self.grpc.set_serving(False)
        self._agents.close()
        self._control.close("the scheduler is about to stop")
        await self.grpc.stop(self.coordinator.config.drain_timeout_s)
        self._alarm.stop()
        await self.metrics.stop()


async def run(config: SchedulerConfig, telemetry: Telemetry, stop: asyncio.Event) -> int:
    """Serves until `stop` is set.

    Prints one line on stdout once it serves.

    Returns:
        The exit code.

    Raises:
        ConfigError: It cannot start as configured.
    """
    scheduler = await Scheduler.start(config, telemetry)
    # Almost nothing here lies in cycles: to look through ten thousand sessions for some every few
    # hundred allocations would delay wakes by milliseconds.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    print(f"djinn-scheduler ready on {scheduler.address}", flush=True)  # noqa: T201 - the contract
    try:
        await stop.wait()
    finally:
        await scheduler.stop()
    return 0
