"""The arena: its size, and how it is pinned while it is used."""

from __future__ import annotations

import mmap
import threading

import pytest

from services.common.errors import ConfigError
from services.worker.engine import host_pool
from services.worker.engine.host_memory import memory_limit_bytes
from services.worker.engine.host_pool import HostPool

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
    assert chunk_bytes <= 256 * MIB


class FakePinning:
    """Pins the first chunk at once, then one each time it is let to.

    Args:
        most: Refuses all after this many.
    """

    def __init__(self, most: int = 100) -> None:
        self.pinned: list[tuple[int, int]] = []
        self.unpinned: list[int] = []
        self.reached, self.go_on = threading.Semaphore(0), threading.Semaphore(0)
        self._most = most

    def pin(self, address: int, size_bytes: int) -> None:
        if len(self.pinned) >= self._most:
            raise ConfigError("no more")
        if self.pinned:
            self.reached.release()
            self.go_on.acquire()
        self.pinned.append((address, size_bytes))

    def unpin(self, address: int) -> None:
        self.unpinned.append(address)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_pool, "_CHUNK_BYTES", 4 * MIB)


def join(pool: HostPool) -> None:
    assert pool._thread is not None
    pool._thread.join()


@pytest.mark.usefixtures("small_chunks")
def test_blocks_become_usable_chunk_by_chunk_and_each_is_pinned_once() -> None:
    pinning = FakePinning()
    pool = HostPool(5, 2 * MIB, pinning=pinning)
    for usable in (2, 4):
        pinning.reached.acquire()
        assert pool.usable_blocks == usable
        pinning.go_on.release()
    join(pool)
    assert pool.usable_blocks == 5
    start = pool.bytes.data_ptr()
    assert pinning.pinned == [
        (start, 4 * MIB),
        (start + 4 * MIB, 4 * MIB),
        (start + 8 * MIB, 2 * MIB),
    ]
    pool.close()
    assert pinning.unpinned == [address for address, _ in pinning.pinned]


def test_where_nothing_can_be_pinned_it_is_said_at_once() -> None:
    with pytest.raises(ConfigError, match="no more"):
        HostPool(3, MIB, pinning=FakePinning(most=0))


@pytest.mark.usefixtures("small_chunks")
def test_what_the_driver_refuses_later_makes_the_pool_smaller(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pool = HostPool(5, 2 * MIB, pinning=FakePinning(most=1))
    join(pool)
    assert pool.usable_blocks == 2
    assert "stays at 0.0 GiB: no more" in caplog.text
    pool.close()


@pytest.mark.usefixtures("small_chunks")
def test_no_more_is_pinned_than_there_is_memory_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spare = 1 << 30
    left = iter([spare + 4 * MIB, spare + MIB])
    monkeypatch.setattr(host_pool, "available_bytes", lambda: next(left, spare + MIB))
    monkeypatch.setattr(host_pool, "_GROWTH_TIMEOUT_S", 0.0)
    pool = HostPool(5, 2 * MIB, pinning=FakePinning())
    join(pool)
    assert pool.usable_blocks == 2
    assert "1.0 GiB of memory left" in caplog.text
    pool.close()
