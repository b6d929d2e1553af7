"""A step's inputs at fixed places, on the host and on the device, moved by one kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_ALIGNMENT = 64
_WORD = torch.int32
_NUMPY_TYPES = {torch.int64: np.int64, torch.int32: np.int32}


class StepBuffers:
    """Named rows of integers in one piece of pinned memory and in one of device memory.

    Attributes:
        host: What to write before `send`.
        host_tensors: The same memory.
        device: Where `send` copies it.

    Args:
        fields: Type (int64 or int32) and length of each; the last may be sent in part.
        device: Where.
    """

    def __init__(self, fields: Mapping[str, tuple[torch.dtype, int]], device: torch.device) -> None:
        self.host: dict[str, npt.NDArray[Any]] = {}
        self.host_tensors: dict[str, torch.Tensor] = {}
        self.device: dict[str, torch.Tensor] = {}
        starts: dict[str, int] = {}
        end = 0
        for name, (dtype, length) in fields.items():
            starts[name] = -(-end // _ALIGNMENT) * _ALIGNMENT
            end = starts[name] + length * dtype.itemsize
        self._source = torch.zeros(end, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._target = torch.zeros(end, dtype=torch.uint8, device=device)
        self._copy = _copying(device)
        for name, (dtype, length) in fields.items():
            span = slice(starts[name], starts[name] + length * dtype.itemsize)
            self.host_tensors[name] = self._source[span].view(dtype)
            self.host[name] = self._source.numpy()[span].view(_NUMPY_TYPES[dtype])
            self.device[name] = self._target[span].view(dtype)
            self._last_start, self._last_itemsize = starts[name], dtype.itemsize

    def send(self, last_count: int) -> None:
        """Queues the copy of everything, of the last field only its first elements."""
        used = self._last_start + last_count * self._last_itemsize
        words = slice(0, used // _WORD.itemsize)
        self._copy(self._source.view(_WORD)[words], self._target.view(_WORD)[words])


def _copying(device: torch.device) -> Callable[[torch.Tensor, torch.Tensor], object]:
    if device.type != "cuda":
        return lambda source, target: target.copy_(source)
    from services.worker.engine import bus_copies

    return bus_copies.copy
