"""Copies between two memories, beside the step loop.

A `CopyJob` knows nothing of KV: bytes of one flat memory go to another, after some events, more or
less urgently. Loads and stores have a stream each, so that both directions run at once.

A stream is given little ahead, in lots of some megabytes, so that an urgent job overtakes all that
has not been given to it yet, even the rest of a job that has begun. What nothing can overtake, a
wake's load, is given to it whole and at once: it does not depend on how often the loop polls, and
its events are there for compute to wait for as soon as it is submitted.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field
from enum import IntEnum

import torch

from services.worker.engine.copies import Copy, Runs, copy_one_by_one, split, total_bytes
from services.worker.engine.streams import Event, Stream


class Priority(IntEnum):
    """Smaller goes first."""

    WAKE = 0
    EVICT = 1
    PREFETCH = 2
    WRITE_THROUGH = 3


@dataclass(eq=False, slots=True)
class CopyJob:
    """One copy from a flat memory to another.

    Attributes:
        source: uint8, one dimension.
        destination: uint8, one dimension.
        parts: What to copy, part after part; neither it nor any of them is ever empty.
        priority: Smaller is launched first; equal ones in order of submission.
        after: Events that must be reached before the first byte is read or written.
        part_events: One for each part that has been launched, reached when it has been copied.
        start_ns: Wall clock when its stream came to it; 0 before it is done.
        end_ns: Wall clock when its last byte had been copied; 0 before it is done.
    """

    source: torch.Tensor
    destination: torch.Tensor
    parts: tuple[Runs, ...]
    priority: Priority
    after: tuple[Event, ...] = ()
    part_events: list[Event] = field(default_factory=list)
    start_ns: int = 0
    end_ns: int = 0

    @property
    def size_bytes(self) -> int:
        """Bytes of all runs."""
        return sum(map(total_bytes, self.parts))


@dataclass(frozen=True, slots=True)
class _Lot:
    """What is given to a stream in one go."""

    runs: Runs
    size_bytes: int
    ends_part: bool


@dataclass(eq=False, slots=True)
class _Progress:
    """A job on its way, and what of it has not been given to its stream."""

    job: CopyJob
    lots: deque[_Lot]
    start: Event | None = None


@dataclass(frozen=True, slots=True)
class _Launched:
    progress: _Progress
    size_bytes: int
    event: Event
    is_last: bool


@dataclass(slots=True)
class _Lane:
    """One direction: its stream, what waits for it and what was given to it."""

    stream: Stream
    waiting: list[tuple[Priority, int, _Progress]] = field(default_factory=list)
    launched: deque[_Launched] = field(default_factory=deque)
    launched_bytes: int = 0
    jobs: int = 0


class Transfers:
    """Carries out copy jobs.

    Args:
        load: Stream for jobs to the device.
        store: Stream for jobs to the host.
        ahead_bytes: A stream is given more only while less than this is under way, but for wakes.
            At PCIe gen 5's 55 GB/s 96 MiB last 1.8 ms: an urgent job waits no longer, and a loop
            that polls once a millisecond keeps the wire full.
        lot_bytes: It is given this much at a time.
        copy: How runs are copied.
    """

    def __init__(
        self,
        load: Stream,
        store: Stream,
        ahead_bytes: int = 96 << 20,
        lot_bytes: int = 32 << 20,
        copy: Copy = copy_one_by_one,
    ) -> None:
        self._lanes = {True: _Lane(load), False: _Lane(store)}
        self._ahead_bytes = ahead_bytes
        self._lot_bytes = lot_bytes
        self._copy = copy
        self._submitted = 0

    def submit(self, job: CopyJob, *, to_device: bool) -> None:
        """Queues a job; `poll` returns it when it is done.

        One of priority `WAKE` is launched at once.
        """
        lane = self._lanes[to_device]
        heapq.heappush(
            lane.waiting, (job.priority, self._submitted, _Progress(job, self._lots(job)))
        )
        self._submitted += 1
        lane.jobs += 1
        self._launch(lane)

    def hasten(self, job: CopyJob, priority: Priority, *, to_device: bool) -> None:
        """Raises the priority of what has not been launched of a job; else does nothing."""
        lane = self._lanes[to_device]
        if priority >= job.priority:
            return
        for place, (_, number, progress) in enumerate(lane.waiting):
            if progress.job is job:
                job.priority = priority
                lane.waiting[place] = (priority, number, progress)
                heapq.heapify(lane.waiting)
                self._launch(lane)
                return

    def poll(self) -> list[CopyJob]:
        """Returns the jobs done since the last call and launches what may go next.

        Raises:
            Exception: What a copy raised; the contents of its destination are lost.
        """
        done = []
        for lane in self._lanes.values():
            while lane.launched and lane.launched[0].event.query():
                launched = lane.launched.popleft()
                lane.launched_bytes -= launched.size_bytes
                if launched.is_last:
                    job, start = launched.progress.job, launched.progress.start
                    assert start is not None
                    job.start_ns = start.reached_ns()
                    job.end_ns = launched.event.reached_ns()
                    lane.jobs -= 1
                    done.append(job)
            self._launch(lane)
        return done

    def in_flight(self, *, to_device: bool) -> int:
        """Returns how many jobs of one direction wait or run."""
        return self._lanes[to_device].jobs

    def _lots(self, job: CopyJob) -> deque[_Lot]:
        lots: deque[_Lot] = deque()
        for part in job.parts:
            whole = job.priority is Priority.WAKE
            pieces = [part] if whole else split(part, self._lot_bytes)
            lots.extend(
                _Lot(runs, total_bytes(runs), ends_part=runs is pieces[-1]) for runs in pieces
            )
        return lots

    def _launch(self, lane: _Lane) -> None:
        while lane.waiting:
            priority, _, progress = lane.waiting[0]
            if priority is not Priority.WAKE and lane.launched_bytes >= self._ahead_bytes:
                return
            job, lot = progress.job, progress.lots.popleft()
            is_last = not progress.lots
            if is_last:
                heapq.heappop(lane.waiting)
            if progress.start is None:
                for event in job.after:
                    lane.stream.wait(event)
                progress.start = lane.stream.record(timed=True)
            lane.stream.launch(
                lambda job=job, runs=lot.runs: self._copy(  # type: ignore[misc]
                    job.source, job.destination, runs
                )
            )
            event = lane.stream.record(timed=is_last)
            if lot.ends_part:
                job.part_events.append(event)
            lane.launched.append(_Launched(progress, lot.size_bytes, event, is_last))
            lane.launched_bytes += lot.size_bytes
