"""The steps in flight: at most one that runs and one behind it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from services.worker.engine.batcher import Batch
from services.worker.engine.sequence import Request
from services.worker.engine.step import PendingStep, StepPlan, StepResult
from services.worker.engine.step_clock import StepClock, StepSize
from services.worker.engine.streams import Event, Stream


class StepRunner(Protocol):
    """Launches steps on the compute stream."""

    def launch(self, plan: StepPlan) -> PendingStep:
        """Launches a step without blocking."""


@dataclass(frozen=True, slots=True)
class StepStatistics:
    """Of the steps that ended in some interval.

    Attributes:
        seconds: How long each ran.
        batch_sizes: Sequences in each.
        idle_share: Of the time in which steps ran, and in which the device waited for the next one
            although a request of the one before went on, the latter's part. By the device's clock.
    """

    seconds: list[float]
    batch_sizes: list[int]
    idle_share: float


class StepPipeline:
    """Launches steps behind each other and hands them back in order.

    Args:
        runner: Launches steps on `compute`.
        compute: The stream that steps run on.
        clock: Says when the next step may be launched.
    """

    def __init__(self, runner: StepRunner, compute: Stream, clock: StepClock) -> None:
        self._runner = runner
        self._compute = compute
        self._clock = clock
        self._in_flight: deque[tuple[Batch, PendingStep]] = deque()
        self._last_ended: dict[Request, int] = {}
        self._seconds: list[float] = []
        self._batch_sizes: list[int] = []
        self._idle_s = 0.0

    @property
    def empty(self) -> bool:
        """True if no step is in flight."""
        return not self._in_flight

    @property
    def latest(self) -> Batch | None:
        """The batch launched last, if its step is in flight."""
        return self._in_flight[-1][0] if self._in_flight else None

    def due_s(self, next_size: StepSize) -> float | None:
        """See `StepClock.due_s`; on the clock of `time.monotonic`."""
        return self._clock.due_s(next_size)

    def is_soon(self, wait_s: float) -> bool:
        """See `StepClock.is_soon`."""
        return self._clock.is_soon(wait_s)

    def launch(self, batch: Batch) -> Event:
        """Launches a step behind all others.

        Returns:
            What is reached when it is done.
        """
        begin_s = time.monotonic()
        pending = self._runner.launch(batch.plan)
        fence = self._compute.record()
        self._clock.launched(batch.size, begin_s, time.monotonic())
        self._in_flight.append((batch, pending))
        return fence

    def collect(self) -> Iterator[tuple[Batch, StepResult]]:
        """Takes out the steps that are done, in the order of their launch."""
        while self._in_flight and self._in_flight[0][1].done():
            batch, pending = self._in_flight.popleft()
            result = pending.result()
            self._clock.ended(result.busy_s, time.monotonic())
            self._seconds.append(result.busy_s)
            self._batch_sizes.append(len(batch.shares))
            if not self._last_ended.keys().isdisjoint(batch.slice_of):
                self._idle_s += result.gap_s
            self._last_ended = batch.slice_of
            yield batch, result

    def take_statistics(self) -> StepStatistics:
        """Returns the statistics since the last call."""
        busy_s = sum(self._seconds)
        share = self._idle_s / (self._idle_s + busy_s) if busy_s else 0.0
        statistics = StepStatistics(self._seconds, self._batch_sizes, share)
        self._seconds, self._batch_sizes, self._idle_s = [], [], 0.0
        return statistics
