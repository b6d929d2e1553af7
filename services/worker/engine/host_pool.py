"""The host's half of the KV: one arena, allocated once."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import torch

from services.common.errors import ConfigError


class HostPool:
    """Host memory for `num_blocks` blocks, by anonymous mapping.

    torch's own pinned allocator rounds each request up to a power of two, so the memory is mapped
    here and the driver told of it.

    Args:
        num_blocks: Blocks; may be 0.
        block_bytes: Bytes of a block.
        pin: Register the memory with the CUDA driver, so that copies are asynchronous.

    Raises:
        ConfigError: The machine has not that much memory.
    """

    def __init__(self, num_blocks: int, block_bytes: int, *, pin: bool) -> None:
        size_bytes = num_blocks * block_bytes
        limit_bytes = memory_limit_bytes()
        if size_bytes > limit_bytes:
            raise ConfigError(
                f"--host-pool-gib {size_bytes / 2**30:.1f}: this machine has "
                f"{limit_bytes / 2**30:.1f} GiB of memory"
            )
        self._pinned = False
        self._map = mmap.mmap(-1, max(size_bytes, mmap.PAGESIZE))
        self._map.madvise(mmap.MADV_HUGEPAGE)
        flat = torch.frombuffer(self._map, dtype=torch.uint8, count=max(size_bytes, 1))
        self.bytes = flat[:size_bytes]
        if pin and size_bytes:
            self._register()

    def close(self) -> None:
        """Frees the memory's registration with the driver; nothing may be copying."""
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self.bytes.data_ptr())
            self._pinned = False

    def _register(self) -> None:
        status = torch.cuda.cudart().cudaHostRegister(self.bytes.data_ptr(), self.bytes.numel(), 0)
        if int(status) != 0:
            raise ConfigError(
                f"--host-pool-gib {self.bytes.numel() / 2**30:.1f}: the driver would not pin it "
                f"(CUDA error {int(status)}); is `ulimit -l` unlimited?"
            )
        self._pinned = True


def memory_limit_bytes() -> int:
    """Returns the most memory this process may use: its control group's limit or the machine's."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return physical
    return physical if limit == "max" else int(limit)
