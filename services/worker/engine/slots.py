"""The slots of one pool: which are free, and which may be reused in what order."""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Iterable

from services.worker.engine.block import Block
from services.worker.engine.streams import Event


class DeviceSlots:
    """The device pool's slots. Freed ones go out lowest first, so that copies join into runs.

    A block is *reclaimable* while its slot may be given to another without losing anything that is
    needed. Reclaimable blocks are ranked: unreferenced ones first, then the furthest expected wake,
    then whoever has been reclaimable longest.

    Args:
        total: Slots in the pool.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.free = list(range(total))
        self.reclaimable = 0
        self._ranked: list[tuple[tuple[int, float, int], Block]] = []
        self._ranks = 0
        self._touched: dict[int, Event] = {}

    def rank(self, block: Block) -> None:
        """Makes a block reclaimable."""
        if block.reclaim_rank is not None:
            return
        self._ranks += 1
        far = math.inf if block.expected_wake_ns is None else float(block.expected_wake_ns)
        block.reclaim_rank = (0 if block.refs == 0 else 1, -far, self._ranks)
        heapq.heappush(self._ranked, (block.reclaim_rank, block))
        self.reclaimable += 1
        if len(self._ranked) > 64 + 2 * self.reclaimable:
            # Most entries are of blocks that were unranked since.
            self._ranked = [entry for entry in self._ranked if entry[0] == entry[1].reclaim_rank]
            heapq.heapify(self._ranked)

    def unrank(self, block: Block) -> None:
        """Makes a block not reclaimable."""
        if block.reclaim_rank is not None:
            block.reclaim_rank = None
            self.reclaimable -= 1

    def pop_ranked(self) -> Block:
        """Returns the first reclaimable block, which is none any more; there must be one."""
        while True:
            rank, block = heapq.heappop(self._ranked)
            if block.reclaim_rank == rank:
                self.unrank(block)
                return block

    def give_back(self, block: Block) -> None:
        """Frees a block's slot."""
        assert block.device is not None
        self.unrank(block)
        heapq.heappush(self.free, block.device)
        block.device = None

    def touch(self, slots: Iterable[int], fence: Event) -> None:
        """Notes that work launched before `fence` may still touch these slots."""
        for slot in slots:
            self._touched[slot] = fence

    def fences(self, slots: Iterable[int]) -> tuple[Event, ...]:
        """Returns the events that the next writer of these slots must wait for (rule 7)."""
        found: dict[int, Event] = {}
        for slot in slots:
            event = self._touched.pop(slot, None)
            if event is not None and not event.query():
                found[id(event)] = event
        return tuple(found.values())


class HostSlots:
    """The host pool's slots.

    A block is *spare* while losing its host copy costs nobody's KV: nobody references the block,
    or it is held on the device, where it only becomes dirty again.

    Args:
        total: Slots in the pool so far.
    """

    def __init__(self, total: int) -> None:
        self.total = 0
        self.free: list[int] = []
        self.grow(total)
        self._unreferenced: OrderedDict[Block, None] = OrderedDict()
        self._held: OrderedDict[Block, None] = OrderedDict()

    def grow(self, total: int) -> None:
        """Adds free slots until there are `total`."""
        for slot in range(self.total, total):
            heapq.heappush(self.free, slot)
        self.total = max(self.total, total)

    @property
    def spare(self) -> int:
        """Number of spare blocks."""
        return len(self._unreferenced) + len(self._held)

    def sort(self, block: Block, *, idle: bool) -> None:
        """Lists a block as spare, or not, by its references and holders.

        Args:
            block: Any.
            idle: It has a slot, and no copy in flight reads or writes it.
        """
        _list(self._unreferenced, block, idle and block.refs == 0)
        _list(self._held, block, idle and block.holders > 0)

    def pop_spare(self, *, held_too: bool) -> Block | None:
        """Returns the longest spare block, unreferenced ones first; it is spare no more."""
        queue = self._unreferenced
        if not queue and held_too:
            queue = self._held
        if not queue:
            return None
        block, _ = queue.popitem(last=False)
        return block

    def give_back(self, block: Block) -> None:
        """Frees a block's slot."""
        assert block.host is not None
        heapq.heappush(self.free, block.host)
        block.host = None
        block.stored_tokens = 0


def _list(queue: OrderedDict[Block, None], block: Block, wanted: bool) -> None:
    if wanted:
        queue.setdefault(block)
    else:
        queue.pop(block, None)
