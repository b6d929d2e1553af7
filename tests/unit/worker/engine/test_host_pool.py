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
        HostPool(memory_limit_bytes() // MIB + 1, MIB, pin=None)


def test_a_pool_is_flat_and_writable() -> None:
    pool = HostPool(3, 1000, pin=None)
    pool.bytes.fill_(7)
    assert pool.bytes.shape == (3000,)
    assert int(pool.bytes.sum()) == 21000
    assert pool.usable_blocks == 3


def test_a_pool_of_nothing_is_fine() -> None:
    pool = HostPool(0, 1000, pin=None)
    assert pool.bytes.numel() == pool.usable_blocks == 0
    pool.close()


@pytest.mark.parametrize("block_bytes", [8 * MIB, 737_280, 1000])
def test_a_chunk_is_whole_blocks_and_whole_pages(block_bytes: int) -> None:
    chunk_bytes = HostPool(0, block_bytes, pin=None).chunk_blocks() * block_bytes
    assert chunk_bytes % mmap.PAGESIZE == 0
    assert chunk_bytes <= 1 << 30


def test_blocks_become_usable_chunk_by_chunk_and_each_is_pinned_once() -> None:
    pinned: list[tuple[int, int]] = []
    go_on, reached = threading.Semaphore(0), threading.Semaphore(0)

    def pin(address: int, size_bytes: int) -> None:
        reached.release()
        go_on.acquire()
        pinned.append((address, size_bytes))

    pool = HostPool(300, 8 * MIB, pin=pin)  # nothing of it is ever touched
    for usable in (0, 128, 256):
        reached.acquire()
        assert pool.usable_blocks == usable
        go_on.release()
    pool.close()
    assert pool.usable_blocks == 300
    start = pool.bytes.data_ptr()
    assert pinned == [
        (start, 1 << 30),
        (start + (1 << 30), 1 << 30),
        (start + (2 << 30), 44 * 8 * MIB),
    ]


def test_a_refusal_of_the_driver_is_told() -> None:
    def pin(_address: int, _size_bytes: int) -> None:
        raise ConfigError("no")

    pool = HostPool(3, MIB, pin=pin)
    pool.close()
    with pytest.raises(ConfigError, match="no"):
        _ = pool.usable_blocks
