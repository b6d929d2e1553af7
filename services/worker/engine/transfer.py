"""Copies between two memories, beside the step loop.

A `CopyJob` knows nothing of KV: bytes of one flat memory go to another, after some events, more or
less urgently. Loads and stores have a stream each, so that both directions run at once. A stream
is given little ahead, so that an urgent job overtakes all that has not been given to it yet.
"""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum

import torch

from services.worker.engine.streams import Event, Stream


class Priority(IntEnum):
    """Smaller goes first."""

    WAKE = 0
    EVICT = 1
    PREFETCH = 2
    WRITE_THROUGH = 3


@dataclass(frozen=True, slots=True)
class Run:
    """Adjoining bytes.

    Attributes:
        source: First byte in the source.
        destination: First byte in the destination.
        size_bytes: How many.
    """

    source: int
    destination: int
    size_bytes: int


@dataclass(eq=False, slots=True)
class CopyJob:
    """One copy from a flat memory to another.

    Attributes:
        source: uint8, one dimension.
        destination: uint8, one dimension.
        runs: What to copy; never empty.
        priority: Smaller is launched first; equal ones in order of submission.
        after: Events that must be reached before the first byte is read or written.
        start_ns: Wall clock when its stream came to it; 0 before.
        end_ns: Wall clock when it was done, or on a GPU was seen to be; 0 before.
    """

    source: torch.Tensor
    destination: torch.Tensor
    runs: tuple[Run, ...]
    priority: Priority
    after: tuple[Event, ...] = ()
    start_ns: int = 0
    end_ns: int = 0

    @property
    def size_bytes(self) -> int:
        """Bytes of all runs."""
        return sum(run.size_bytes for run in self.runs)

    @property
    def on_gpu(self) -> bool:
        """True if the copy goes on after the call that launches it has returned."""
        return self.source.is_cuda or self.destination.is_cuda


def coalesce(
    pairs: Iterable[tuple[int, int]],
    block_bytes: int,
    *,
    source_seam: int | None = None,
    destination_seam: int | None = None,
) -> tuple[Run, ...]:
    """Returns block copies as runs, adjoining blocks joined.

    Args:
        pairs: (source block, destination block); no destination twice.
        block_bytes: Bytes of a block on both sides.
        source_seam: No run crosses a multiple of this many blocks of the source: a copy whose host
            memory was pinned in two pieces is refused by the CUDA driver. None: no seams.
        destination_seam: The same of the destination.
    """
    runs: list[Run] = []
    for source, destination in sorted(pairs):
        run = Run(source * block_bytes, destination * block_bytes, block_bytes)
        last = runs[-1] if runs else None
        if (
            last is not None
            and not _on_seam(source, source_seam)
            and not _on_seam(destination, destination_seam)
            and last.source + last.size_bytes == run.source
            and last.destination + last.size_bytes == run.destination
        ):
            runs[-1] = Run(last.source, last.destination, last.size_bytes + block_bytes)
        else:
            runs.append(run)
    return tuple(runs)


def _on_seam(block: int, seam: int | None) -> bool:
    return seam is not None and block % seam == 0


@dataclass(slots=True)
class _Lane:
    """One direction: its stream, what waits for it and what was given to it."""

    stream: Stream
    waiting: list[tuple[Priority, int, CopyJob]] = field(default_factory=list)
    launched: deque[tuple[CopyJob, Event]] = field(default_factory=deque)
    launched_bytes: int = 0


class Transfers:
    """Carries out copy jobs.

    Args:
        load: Stream for jobs to the device.
        store: Stream for jobs to the host.
        ahead_bytes: A stream is given another job only while less than this is under way.
    """

    def __init__(self, load: Stream, store: Stream, ahead_bytes: int = 64 << 20) -> None:
        self._lanes = {True: _Lane(load), False: _Lane(store)}
        self._ahead_bytes = ahead_bytes
        self._submitted = 0

    def submit(self, job: CopyJob, *, to_device: bool) -> None:
        """Queues a job; `poll` returns it when it is done."""
        lane = self._lanes[to_device]
        heapq.heappush(lane.waiting, (job.priority, self._submitted, job))
        self._submitted += 1
        self._launch(lane)

    def hasten(self, job: CopyJob, priority: Priority, *, to_device: bool) -> None:
        """Raises the priority of a job that has not been launched; else does nothing."""
        lane = self._lanes[to_device]
        if priority >= job.priority:
            return
        for place, (_, number, waiting) in enumerate(lane.waiting):
            if waiting is job:
                job.priority = priority
                lane.waiting[place] = (priority, number, job)
                heapq.heapify(lane.waiting)
                return

    def poll(self) -> list[CopyJob]:
        """Returns the jobs done since the last call and launches what may go next.

        Raises:
            Exception: What a copy raised; the contents of its destination are lost.
        """
        done = []
        for lane in self._lanes.values():
            while lane.launched and lane.launched[0][1].query():
                job, _ = lane.launched.popleft()
                lane.launched_bytes -= job.size_bytes
                if job.on_gpu:
                    job.end_ns = time.time_ns()
                done.append(job)
            self._launch(lane)
        return done

    def in_flight(self, *, to_device: bool) -> int:
        """Returns how many jobs of one direction wait or run."""
        lane = self._lanes[to_device]
        return len(lane.waiting) + len(lane.launched)

    def _launch(self, lane: _Lane) -> None:
        while lane.waiting and lane.launched_bytes < self._ahead_bytes:
            _, _, job = heapq.heappop(lane.waiting)
            for event in job.after:
                lane.stream.wait(event)
            lane.stream.launch(lambda job=job: _copy(job))  # type: ignore[misc]
            lane.launched.append((job, lane.stream.record()))
            lane.launched_bytes += job.size_bytes


def _copy(job: CopyJob) -> None:
    job.start_ns = time.time_ns()
    for run in job.runs:
        job.destination[run.destination : run.destination + run.size_bytes].copy_(
            job.source[run.source : run.source + run.size_bytes], non_blocking=True
        )
    job.end_ns = time.time_ns()
