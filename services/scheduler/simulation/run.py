"""One simulation: the scheduler's coordinator, modelled workers and traced agents, put together."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from services.scheduler.config import SchedulerConfig
from services.scheduler.coordinator import Coordinator
from services.scheduler.domain import Phase
from services.scheduler.simulation.agents import Agent, Population
from services.scheduler.simulation.clock import Events
from services.scheduler.simulation.parameters import WorkerParameters
from services.scheduler.simulation.result import Record, RunFolder, StatsRecord
from services.scheduler.simulation.trace import TracedAgent
from services.scheduler.simulation.worker_model import FIGURES, WorkerModel

EPOCH = "simulation"
TENANT = "simulation"


@dataclass(frozen=True, slots=True)
class Options:
    """How to simulate.

    Attributes:
        workers: How many.
        live: Agents keep their sessions until the last one has done its work.
        oracle: The scheduler is told how long each tool call will take.
        sample_interval_s: Virtual time between two records of counters and pools.
        until_s: Stop at this virtual time, whoever is still at work; None: when all are done.
    """

    workers: int = 1
    live: bool = True
    oracle: bool = False
    sample_interval_s: float = 1.0
    until_s: float | None = None


@dataclass(frozen=True, slots=True)
class Summary:
    """How a simulation went.

    Attributes:
        virtual_s: Virtual time from the start to the last agent's end.
        wall_s: How long it took.
        happenings: Events that happened.
        interrupted: Whether agents were still at work.
        stats_after: The counters and pools at the end.
    """

    virtual_s: float
    wall_s: float
    happenings: int
    interrupted: bool
    stats_after: dict[str, float]


class Simulation:
    """One run; `run` does it.

    As in the service, whoever tells the coordinator something has its next due time looked at anew.

    Args:
        agents: What they do, in order of arrival.
        config: Of the scheduler.
        parameters: Of each worker.
        options: How to simulate.
        folder: Where records go; None: nowhere.
    """

    def __init__(
        self,
        agents: Sequence[TracedAgent],
        config: SchedulerConfig,
        parameters: WorkerParameters,
        options: Options,
        folder: RunFolder | None = None,
    ) -> None:
        self.events = Events(0.0)
        self.coordinator = Coordinator(config, 0.0, epoch=EPOCH)
        self.records: list[Record] = []
        self._options = options
        self._due_s = self.coordinator.next_due_s()
        self._emit = folder.add if folder is not None else self.records.append
        self.workers = [
            WorkerModel(
                self.events, self.coordinator, parameters, f"worker-{number:04d}", self._told
            )
            for number in range(options.workers)
        ]
        self._population = Population(
            events=self.events,
            coordinator=self.coordinator,
            on_told=self._told,
            workers={worker.worker_id: worker for worker in self.workers},
            latencies=parameters.latencies,
            emit=self._emit,
            block_bytes=parameters.block_bytes,
            tenant=TENANT,
            live=options.live,
            oracle=options.oracle,
        )
        for index, traced in enumerate(agents):
            Agent(self._population, index, traced)
        interval_s = config.report_interval_s
        for number, worker in enumerate(self.workers):
            # Workers do not all report at one moment.
            first_s = interval_s * (number + 1) / len(self.workers)
            self.events.at(first_s, self._report, worker, interval_s)
        self.events.at(options.sample_interval_s, self._sample)

    def run(self) -> Summary:
        """Simulates to the end of the last agent."""
        was_enabled = gc.isenabled()
        # What is made here dies young and lies in no cycles.
        gc.disable()
        start_s = time.perf_counter()
        try:
            happenings = self._loop()
        finally:
            if was_enabled:
                gc.enable()
        return Summary(
            virtual_s=self.events.now_s,
            wall_s=time.perf_counter() - start_s,
            happenings=happenings,
            interrupted=self._population.at_work > 0,
            stats_after=self.stats(),
        )

    def _loop(self) -> int:
        events, coordinator = self.events, self.coordinator
        until_s = math.inf if self._options.until_s is None else self._options.until_s
        happenings = 0
        while self._population.at_work:
            self._due_s = coordinator.next_due_s()
            happenings += events.run(min(self._due_s, until_s))
            if not self._population.at_work:
                break
            next_s = events.next_s()
            if min(next_s, self._due_s) >= until_s:
                events.now_s = until_s
                break
            if self._due_s <= next_s:
                events.now_s = self._due_s
                coordinator.advance(self._due_s)
                happenings += 1
        return happenings

    def _told(self) -> None:
        if self.coordinator.next_due_s() < self._due_s:
            self.events.stop()

    def _report(self, worker: WorkerModel, interval_s: float) -> None:
        worker.report()
        self.events.after(interval_s, self._report, worker, interval_s)

    def _sample(self) -> None:
        self._emit(StatsRecord(round(self.events.now_s, 6), self.stats()))
        self.events.after(self._options.sample_interval_s, self._sample)

    def stats(self) -> dict[str, float]:
        """Returns all workers' counters and pools, by the names that real runs record."""
        sums = map(sum, zip(*(worker.figures() for worker in self.workers), strict=True))
        values: dict[str, float] = dict(zip(FIGURES, sums, strict=True))
        for phase in (Phase.OPEN, Phase.COMPUTE, Phase.IO_WAIT):
            values[f"sessions_{phase.name.lower()}"] = self.coordinator.store.count(phase)
        values["uptime_s"] = self.events.now_s
        return values
