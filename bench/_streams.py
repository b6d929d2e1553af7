"""The worker's streams as a benchmark uses them: made for a device, run and waited for."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from services.worker.engine.cuda_streams import CudaStream
from services.worker.engine.streams import CpuStream, Stream, Wakeup, Work


def make_stream(name: str, device: torch.device, wakeup: Wakeup) -> Stream:
    """Returns a stream of the worker's kind for a device.

    Args:
        name: Of a CPU stream's thread.
        device: Where its work runs.
        wakeup: Set whenever a CPU stream reaches an event.
    """
    return CudaStream(device) if device.type == "cuda" else CpuStream(name, wakeup)


def seconds(*launches: tuple[Stream, Work]) -> float:
    """Returns how long work takes that is launched on some streams at once, until all is done."""
    start = time.perf_counter()
    for stream, work in launches:
        stream.launch(work)
    events = [stream.record() for stream, _ in launches]
    for event in events:
        event.synchronize()
    return time.perf_counter() - start


def median_seconds(rounds: int, launches: Sequence[tuple[Stream, Work]]) -> float:
    """Returns the median of `seconds` over some rounds, after one more that is not counted."""
    times = sorted([seconds(*launches) for _ in range(rounds + 1)][1:])
    return times[len(times) // 2]
