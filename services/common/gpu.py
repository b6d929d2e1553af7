"""Which GPUs a worker could use, found out without loading torch (seconds and gigabytes)."""

from __future__ import annotations

import ctypes
import importlib.util
import re
from pathlib import Path

from services.common.errors import ConfigError


def choose_device(gpu: int | None) -> tuple[str, str | None]:
    """Returns the device for a worker that was told a GPU's index.

    Args:
        gpu: The index, as CUDA counts the visible ones; None: the first, if there is one.

    Returns:
        ``cuda:<index>`` or ``cpu``, and a line for the user where that is not what he asked for.

    Raises:
        ConfigError: There are GPUs, but none of this index.
    """
    count = cuda_device_count()
    if count == 0:
        return "cpu", None if gpu is None else f"--gpu {gpu}: no CUDA GPU found, using the CPU"
    if gpu is not None and gpu >= count:
        raise ConfigError(f"--gpu {gpu}: this machine has {count} (0 to {count - 1})")
    if not torch_has_cuda():
        return "cpu", "the installed PyTorch is built without CUDA, using the CPU"
    return f"cuda:{gpu or 0}", None


def cuda_device_count() -> int:
    """Returns how many GPUs CUDA shows to this process; 0 without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def torch_has_cuda() -> bool:
    """Returns whether the installed torch was built with CUDA; False if none is installed."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    try:
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return False
    return re.search(r"^cuda\b[^=\n]*=\s*['\"]", text, re.MULTILINE) is not None
