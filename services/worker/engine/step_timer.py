"""Marks in a stream's work, for how long steps take on the device itself."""

from __future__ import annotations

import time
from typing import Protocol

import torch


class Mark(Protocol):
    """A point in the compute stream's work."""

    def seconds_until(self, later: Mark) -> float:
        """Returns the time to a later mark of the same stream; both have been reached."""


class _HostMark:
    """A point in the work of a thread."""

    def __init__(self) -> None:
        self._at_s = time.monotonic()

    def seconds_until(self, later: Mark) -> float:
        assert isinstance(later, _HostMark)
        return later._at_s - self._at_s


class _CudaMark:
    """A CUDA event in the current stream."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()

    def seconds_until(self, later: Mark) -> float:
        assert isinstance(later, _CudaMark)
        return float(self._event.elapsed_time(later._event)) / 1e3


def mark(device: torch.device) -> Mark:
    """Marks this point of the work; to be called where the work is queued or, on a CPU, done."""
    return _CudaMark() if device.type == "cuda" else _HostMark()
