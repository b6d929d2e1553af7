"""The host's half of the KV: one arena, allocated once and pinned while requests are served."""

from __future__ import annotations

import logging
import math
import mmap
import threading
import time
from typing import Protocol

import torch

from services.common.errors import ConfigError
from services.worker.engine.host_memory import (
    available_bytes,
    memory_limit_bytes,
    raise_lock_limit,
)

_log = logging.getLogger(__name__)

# While a chunk is registered, every other CUDA call waits: 256 MiB take some 8 ms.
_CHUNK_BYTES = 256 << 20
_PAGE_BYTES = 4096
# Left to everybody else; and how long memory may take to be there on a machine that grows.
_SPARE_BYTES = 1 << 30
_GROWTH_TIMEOUT_S = 60.0


class Pinning(Protocol):
    """Makes host memory fit for asynchronous copies."""

    def pin(self, address: int, size_bytes: int) -> None:
        """Pins memory; raises `ConfigError` if it cannot be."""

    def unpin(self, address: int) -> None:
        """Takes back the `pin` of this address, before the memory is freed."""


class HostPool:
    """Host memory for `num_blocks` blocks, by private anonymous mapping in huge pages.

    torch's own pinned allocator rounds each request up to a power of two, so the memory is mapped
    here and the driver told of it. A thread does so, chunk by chunk, and `usable_blocks` grows
    meanwhile; the first chunk is pinned at once, so that a machine where nothing can be pinned is
    found out at start. Each chunk's pages are touched first, by several threads: the driver
    would fault them in one after another, with every other CUDA call waiting for it.

    When the driver refuses a later chunk, or the machine has no memory left for one, the pool
    stays as large as it is.

    Args:
        num_blocks: Blocks; may be 0.
        block_bytes: Bytes of a block.
        pinning: Asked for each chunk, in order; None: the memory needs no pinning.

    Raises:
        ConfigError: The machine has not that much memory, or pins none.
    """

    def __init__(self, num_blocks: int, block_bytes: int, *, pinning: Pinning | None) -> None:
        size_bytes = num_blocks * block_bytes
        _check_memory(size_bytes, pinned=pinning is not None)
        self.num_blocks = num_blocks
        self._block_bytes = block_bytes
        try:
            self._map = mmap.mmap(
                -1, max(size_bytes, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            )
        except OSError as error:
            raise ConfigError(
                f"--host-pool-gib {size_bytes / 2**30:.1f}: no such mapping: {error}"
            ) from error
        # Shared anonymous memory gets none on most kernels.
        self._map.madvise(mmap.MADV_HUGEPAGE)
        flat = torch.frombuffer(self._map, dtype=torch.uint8, count=max(size_bytes, 1))
        self.bytes = flat[:size_bytes]
        self._usable = num_blocks if pinning is None else 0
        self._pinning = pinning
        self._pinned: list[int] = []
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        if pinning is not None and num_blocks:
            self._start_s = time.monotonic()
            self._pin_chunk(pinning)
            self._thread = threading.Thread(
                target=self._pin, args=(pinning,), name="pin", daemon=True
            )
            self._thread.start()

    @property
    def usable_blocks(self) -> int:
        """Blocks that may be used so far, the first ones; grows while they are being pinned."""
        return self._usable

    def chunk_blocks(self) -> int:
        """Returns the blocks per chunk, so that a chunk is whole pages and about 256 MiB."""
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
        try:
            while self._usable < self.num_blocks and not self._closing.is_set():
                self._pin_chunk(pinning)
        except ConfigError as error:
            _log.error("the host pool stays at %.1f GiB: %s", self._usable_gib, error)
        else:
            if self._usable == self.num_blocks:
                seconds = time.monotonic() - self._start_s
                _log.info(
                    "the host pool's %.1f GiB are pinned, in %.1f s (%.1f GiB/s)",
                    self._usable_gib,
                    seconds,
                    self._usable_gib / max(seconds, 1e-9),
                )

    @property
    def _usable_gib(self) -> float:
        return self._usable * self._block_bytes / 2**30

    def _pin_chunk(self, pinning: Pinning) -> None:
        blocks = min(self.chunk_blocks(), self.num_blocks - self._usable)
        size_bytes = blocks * self._block_bytes
        if not self._await_memory(size_bytes):
            return
        start = self._usable * self._block_bytes
        # Without the interpreter's lock, by all of torch's threads.
        self.bytes[start : start + size_bytes : _PAGE_BYTES].fill_(0)
        address = self.bytes.data_ptr() + start
        pinning.pin(address, size_bytes)
        self._pinned.append(address)
        self._usable += blocks

    def _await_memory(self, size_bytes: int) -> bool:
        """Waits until the machine has so much memory to spare; False when told to close."""
        until_s = time.monotonic() + _GROWTH_TIMEOUT_S
        while available_bytes() < size_bytes + _SPARE_BYTES:
            if time.monotonic() > until_s:
                raise ConfigError(
                    f"--host-pool-gib: the machine has {available_bytes() / 2**30:.1f} GiB of"
                    " memory left"
                )
            if self._closing.wait(0.1):
                return False
        return True


class CudaPinning:
    """Registers host memory with the CUDA driver; the interpreter is free meanwhile."""

    def pin(self, address: int, size_bytes: int) -> None:
        """See `Pinning.pin`."""
        status = int(torch.cuda.cudart().cudaHostRegister(address, size_bytes, 0))
        if status != 0:
            raise ConfigError(
                f"--host-pool-gib: the driver would not pin {size_bytes / 2**30:.2f} GiB more "
                f"(CUDA error {status}); is `ulimit -l` unlimited?"
            )

    def unpin(self, address: int) -> None:
        """See `Pinning.unpin`."""
        torch.cuda.cudart().cudaHostUnregister(address)


def _check_memory(size_bytes: int, *, pinned: bool) -> None:
    limit_bytes = memory_limit_bytes()
    if size_bytes > limit_bytes:
        raise ConfigError(
            f"--host-pool-gib {size_bytes / 2**30:.1f}: this machine has "
            f"{limit_bytes / 2**30:.1f} GiB of memory"
        )
    lock_limit = raise_lock_limit(size_bytes) if pinned else None
    if lock_limit is not None:
        # NVIDIA's driver does not count what it pins against the limit; another's may.
        _log.warning(
            "at most %.3f GiB may be locked in memory (`ulimit -l`): a driver that goes by it"
            " will not pin the host pool's %.1f GiB",
            lock_limit / 2**30,
            size_bytes / 2**30,
        )
