"""A step's inputs at fixed places, on the host and on the device, moved by one copy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_ALIGNMENT = 64
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
        for name, (dtype, length) in fields.items():
            span = slice(starts[name], starts[name] + length * dtype.itemsize)
            self.host_tensors[name] = self._source[span].view(dtype)
            self.host[name] = self._source.numpy()[span].view(_NUMPY_TYPES[dtype])
            self.device[name] = self._target[span].view(dtype)
            self._last_start, self._last_itemsize = starts[name], dtype.itemsize

    def send(self, last_count: int) -> None:
        """Queues the copy of everything, of the last field only its first elements."""
        used = self._last_start + last_count * self._last_itemsize
        self._target[:used].copy_(self._source[:used], non_blocking=True)
