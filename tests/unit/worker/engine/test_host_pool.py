"""The arena: its size, and how it is pinned while it is used."""

from __future__ import annotations

import mmap
import threading

import pytest

from services.common.errors import ConfigError
from services.worker.engine.host_pool import HostPool, memory_limit_bytes

MIB = 1 << 20


def test_a_pool_larger_than_the_machine_is_refused() -> None:
    with pytest.raises(ConfigError, match="this machine has"):
        HostPool(memory_limit_bytes() // MIB + 1, MIB, pinning=None)


def test_a_pool_is_flat_and_writable() -> None:
    pool = HostPool(3, 1000, pinning=None)
    pool.bytes.fill_(7)
    assert pool.bytes.shape == (3000,)
    assert int(pool.bytes.sum()) == 21000
    assert pool.usable_blocks == 3


def test_a_pool_of_nothing_is_fine() -> None:
    pool = HostPool(0, 1000, pinning=None)
    assert pool.bytes.numel() == pool.usable_blocks == 0
    pool.close()


@pytest.mark.parametrize("block_bytes", [8 * MIB, 737_280, 1000])
def test_a_chunk_is_whole_blocks_and_whole_pages(block_bytes: int) -> None:
    chunk_bytes = HostPool(0, block_bytes, pinning=None).chunk_blocks() * block_bytes
    assert chunk_bytes % mmap.PAGESIZE == 0
    assert chunk_bytes <= 1 << 30


class FakePinning:
    """Pins one chunk each time it is let to."""

    def __init__(self) -> None:
        self.pinned: list[tuple[int, int]] = []
        self.unpinned: list[int] = []
        self.reached, self.go_on = threading.Semaphore(0), threading.Semaphore(0)

    def pin(self, address: int, size_bytes: int) -> None:
        self.reached.release()
        self.go_on.acquire()
        self.pinned.append((address, size_bytes))

    def unpin(self, address: int) -> None:
        self.unpinned.append(address)


def test_blocks_become_usable_chunk_by_chunk_and_each_is_pinned_once() -> None:
    pinning = FakePinning()
    pool = HostPool(300, 8 * MIB, pinning=pinning)  # nothing of it is ever touched
    for usable in (0, 128, 256):
        pinning.reached.acquire()
        assert pool.usable_blocks == usable
        pinning.go_on.release()
    pool._thread.join()  # type: ignore[union-attr]
    assert pool.usable_blocks == 300
    start = pool.bytes.data_ptr()
    assert pinning.pinned == [
        (start, 1 << 30),
        (start + (1 << 30), 1 << 30),
        (start + (2 << 30), 44 * 8 * MIB),
    ]
    pool.close()
    assert pinning.unpinned == [address for address, _ in pinning.pinned]


def test_a_refusal_of_the_driver_is_told() -> None:
    class Refusing(FakePinning):
        def pin(self, _address: int, _size_bytes: int) -> None:
            raise ConfigError("no")

    pool = HostPool(3, MIB, pinning=Refusing())
    pool.close()
    with pytest.raises(ConfigError, match="no"):
        _ = pool.usable_blocks
