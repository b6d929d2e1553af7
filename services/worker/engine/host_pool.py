"""The host's half of the KV: one arena, allocated once and pinned while requests are served."""

from __future__ import annotations

import math
import mmap
import os
import threading
from pathlib import Path
from typing import Protocol

import torch

from services.common.errors import ConfigError

_CHUNK_BYTES = 1 << 30


class Pinning(Protocol):
    """Makes host memory fit for asynchronous copies."""

    def pin(self, address: int, size_bytes: int) -> None:
        """Pins memory; raises `ConfigError` if it cannot be."""

    def unpin(self, address: int) -> None:
        """Takes back the `pin` of this address, before the memory is freed."""


class HostPool:
    """Host memory for `num_blocks` blocks, by anonymous mapping.

    torch's own pinned allocator rounds each request up to a power of two, so the memory is mapped
    here and the driver told of it. That takes a third of a second per GiB, so a thread does it,
    chunk by chunk, and `usable_blocks` grows meanwhile. A chunk is whole blocks and whole pages.

    Args:
        num_blocks: Blocks; may be 0.
        block_bytes: Bytes of a block.
        pinning: Asked for each chunk, in order; None: the memory needs no pinning.

    Raises:
        ConfigError: The machine has not that much memory.
    """

    def __init__(self, num_blocks: int, block_bytes: int, *, pinning: Pinning | None) -> None:
        size_bytes = num_blocks * block_bytes
        limit_bytes = memory_limit_bytes()
        if size_bytes > limit_bytes:
            raise ConfigError(
                f"--host-pool-gib {size_bytes / 2**30:.1f}: this machine has "
                f"{limit_bytes / 2**30:.1f} GiB of memory"
            )
        self.num_blocks = num_blocks
        self._block_bytes = block_bytes
        self._map = mmap.mmap(-1, max(size_bytes, mmap.PAGESIZE))
        self._map.madvise(mmap.MADV_HUGEPAGE)
        flat = torch.frombuffer(self._map, dtype=torch.uint8, count=max(size_bytes, 1))
        self.bytes = flat[:size_bytes]
        self._usable = num_blocks if pinning is None else 0
        self._pinning = pinning
        self._pinned: list[int] = []
        self._failure: ConfigError | None = None
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        if pinning is not None and num_blocks:
            self._thread = threading.Thread(
                target=self._pin, args=(pinning,), name="pin", daemon=True
            )
            self._thread.start()

    @property
    def usable_blocks(self) -> int:
        """How many blocks, from the first, may be copied to and from by now.

        Raises:
            ConfigError: The driver would not pin the rest.
        """
        if self._failure is not None:
            raise self._failure
        return self._usable

    def chunk_blocks(self) -> int:
        """Returns the blocks per chunk, so that a chunk is whole pages and about a GiB."""
        whole = math.lcm(self._block_bytes, mmap.PAGESIZE)
        return max(1, _CHUNK_BYTES // whole) * whole // self._block_bytes

    def close(self) -> None:
        """Takes the pinning back; nothing may be copying any more."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
        for address in self._pinned:
            assert self._pinning is not None
            self._pinning.unpin(address)
        self._pinned.clear()

    def _pin(self, pinning: Pinning) -> None:
        while self._usable < self.num_blocks and not self._closing.is_set():
            blocks = min(self.chunk_blocks(), self.num_blocks - self._usable)
            address = self.bytes.data_ptr() + self._usable * self._block_bytes
            try:
                pinning.pin(address, blocks * self._block_bytes)
            except ConfigError as failure:
                self._failure = failure
                return
            self._pinned.append(address)
            self._usable += blocks


class CudaPinning:
    """Registers host memory with the CUDA driver; the interpreter is free meanwhile."""

    def pin(self, address: int, size_bytes: int) -> None:
        """See `Pinning.pin`."""
        status = int(torch.cuda.cudart().cudaHostRegister(address, size_bytes, 0))
        if status != 0:
            raise ConfigError(
                f"--host-pool-gib: the driver would not pin {size_bytes / 2**30:.1f} GiB more "
                f"(CUDA error {status}); is `ulimit -l` unlimited?"
            )

    def unpin(self, address: int) -> None:
        """See `Pinning.unpin`."""
        torch.cuda.cudart().cudaHostUnregister(address)


def memory_limit_bytes() -> int:
    """Returns the most memory this process may use: its control group's limit or the machine's."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return physical
    return physical if limit == "max" else int(limit)
