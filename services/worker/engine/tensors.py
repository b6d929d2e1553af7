"""Moving small tensors between host and device without waiting for either."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch


def upload(array: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """Returns an array on the device, in the order of the current stream.

    Args:
        array: Shares its memory with the result on a CPU: not to be changed any more.
        device: Where to.
    """
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    # From memory that is not pinned, the copy would wait for all that the stream has to do.
    return tensor.pin_memory().to(device, non_blocking=True)


def download(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor in host memory, its values there once the stream's next event is reached.

    It has to be kept until then.
    """
    if tensor.device.type == "cpu":
        return tensor
    from services.worker.engine import bus_copies

    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    bus_copies.copy(tensor.contiguous(), host)
    return host
