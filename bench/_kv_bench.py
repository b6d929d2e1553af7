"""The worker's pools, block manager and copy engine without a model: sessions of KV to move.

Pools fill up in order and copies of adjoining blocks join into runs, which no worker has that has
served for a while. So every other slot of both pools is taken first: no two blocks adjoin.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench import _streams
from services.common.errors import ConfigError
from services.worker.engine.block import Block
from services.worker.engine.block_manager import BlockManager
from services.worker.engine.cuda_copies import choose_copy
from services.worker.engine.host_pool import CudaPinning, HostPool
from services.worker.engine.kv_cache import KVCache
from services.worker.engine.kv_layout import KVLayout
from services.worker.engine.kv_mover import FinishedCopy, KvMover
from services.worker.engine.sequence import Session
from services.worker.engine.streams import Wakeup
from services.worker.engine.transfer import Priority, Transfers

_PINNED_WITHIN_S = 120.0


def wait_pinned(host: HostPool) -> None:
    """Waits until all of a host pool may be used.

    Raises:
        ConfigError: The driver pins no more of it, or takes too long.
    """
    deadline_s = time.monotonic() + _PINNED_WITHIN_S
    while host.usable_blocks < host.num_blocks:
        if time.monotonic() > deadline_s:
            raise ConfigError(
                f"only {host.usable_blocks} of {host.num_blocks} blocks of host memory are pinned"
            )
        # A thread of the pool's pins it, and tells nobody.
        time.sleep(0.01)


@dataclass(frozen=True, slots=True)
class Moved:
    """How long copies took.

    Attributes:
        seconds: From the call that started the first to the poll that found the last one done.
        copy_seconds: From the first byte to the last, of the slowest of them.
    """

    seconds: float
    copy_seconds: float


class KvBench:
    """Two pools of as many blocks, of which every other one is taken for good.

    Args:
        layout: Of a block.
        blocks: That are left for sessions, on each side.
        device: Where the device pool is.

    Attributes:
        mover: Moves sessions' KV.
    """

    def __init__(self, layout: KVLayout, blocks: int, device: torch.device) -> None:
        self._wakeup = Wakeup()
        self._on_gpu = device.type == "cuda"
        self._cache = KVCache(layout, 2 * blocks, device)
        self._host = HostPool(
            2 * blocks, layout.block_bytes, pinning=CudaPinning() if self._on_gpu else None
        )
        self._load = _streams.make_stream("load", device, self._wakeup)
        self._store = _streams.make_stream("store", device, self._wakeup)
        wait_pinned(self._host)
        self.mover = KvMover(
            BlockManager(2 * blocks, 2 * blocks, layout.block_size_tokens),
            Transfers(self._load, self._store, copy=choose_copy(device)),
            self._cache.bytes,
            self._host.bytes,
            layout.block_bytes,
            self._host.chunk_blocks() if self._on_gpu else None,
        )
        taken = [
            self.session(f"taken-{index}", layout.block_size_tokens) for index in range(2 * blocks)
        ]
        for session in taken:
            self.mover.evict(session)
        self.move()
        for session in taken[::2]:
            self.mover.forget(session)
        # What is left stays on both sides.
        for session in taken[1::2]:
            held = self.mover.hold(session, Priority.WAKE)
            assert held

    def session(self, name: str, tokens: int) -> Session:
        """Returns a new session that holds KV of this many tokens, all of it on the device only."""
        session = Session(name, b"", 0)
        self.fill(session, tokens)
        return session

    def fill(self, session: Session, tokens: int) -> list[Block]:
        """Gives a session KV of this many tokens, as a step does; it must have fewer.

        Returns:
            The blocks that this fills.
        """
        held = self.mover.hold(session, Priority.WAKE)
        assert held
        reserved = self.mover.blocks.reserve(session.kv, tokens)
        assert reserved
        return self.mover.blocks.advance(session.kv, tokens)

    def write_through(self, session: Session, tokens: int) -> None:
        """Does as `fill`, and stores the blocks that this fills as the engine stores them."""
        filled = self.fill(session, tokens)
        self.move(lambda: self.mover.write_through(filled, self._load.record()))

    def move(self, *starts: Callable[[], object]) -> Moved:
        """Starts copies and takes in those that are finished, as the step loop does, to the last.

        Args:
            starts: Calls that start some.
        """
        copies: list[FinishedCopy] = []
        begin = time.perf_counter()
        for start in starts:
            start()
        while True:
            self._wakeup.clear()
            copies += self.mover.poll()
            if not self.mover.tickets():
                break
            if not self._on_gpu:
                select.select([self._wakeup.fileno()], [], [])
        spent = time.perf_counter() - begin
        return Moved(spent, max((copy.end_ns - copy.start_ns) / 1e9 for copy in copies))

    def close(self) -> None:
        """Ends the streams and gives the memory back."""
        self._load.close()
        self._store.close()
        self._host.close()
        self._wakeup.close()
