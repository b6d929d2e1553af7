"""The slots of one pool: which are free, and which may be reused in what order."""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence

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
        # Blocks that became reclaimable together: (referenced, less their expected wake, a rank of
        # their own, those of them that have not been reused).
        self._ranked: list[tuple[bool, float, int, deque[Block]]] = []
        self._ranked_blocks = 0
        self._ranks = 0
        self._touched: dict[int, Event] = {}

    def rank(self, blocks: Sequence[Block]) -> None:
        """Makes blocks reclaimable that are not."""
        wake_ns: int | None = None
        referenced = False
        group: deque[Block] | None = None
        for block in blocks:
            if (
                group is None
                or block.expected_wake_ns != wake_ns
                or (block.refs > 0) is not referenced
            ):
                wake_ns, referenced, group = block.expected_wake_ns, block.refs > 0, deque()
                far = -math.inf if wake_ns is None else -float(wake_ns)
                self._ranks += 1
                heapq.heappush(self._ranked, (referenced, far, self._ranks, group))
            block.reclaim_rank = self._ranks
            group.append(block)
        self.reclaimable += len(blocks)
        self._ranked_blocks += len(blocks)
        if self._ranked_blocks > 64 + 2 * self.reclaimable:
            self._tidy()

    def _tidy(self) -> None:
        """Takes out of the order the blocks that are not reclaimable any more."""
        tidied = []
        for referenced, far, rank, group in self._ranked:
            left = deque(block for block in group if block.reclaim_rank == rank)
            if left:
                tidied.append((referenced, far, rank, left))
        heapq.heapify(tidied)
        self._ranked = tidied
        self._ranked_blocks = self.reclaimable

    def unrank(self, block: Block) -> None:
        """Makes a block not reclaimable."""
        if block.reclaim_rank is not None:
            block.reclaim_rank = None
            self.reclaimable -= 1

    def pop_ranked(self) -> Block:
        """Returns the first reclaimable block, which is none any more; there must be one."""
        while True:
            _, _, rank, group = self._ranked[0]
            while group:
                block = group.popleft()
                self._ranked_blocks -= 1
                if block.reclaim_rank == rank:
                    self.unrank(block)
                    return block
            heapq.heappop(self._ranked)

    def give_back(self, block: Block) -> None:
        """Frees a block's slot."""
        assert block.device is not None
        self.unrank(block)
        heapq.heappush(self.free, block.device)
        block.device = None

    def touch(self, slots: Iterable[int], fence: Event) -> None:
        """Notes that work launched before `fence` may still touch these slots."""
        self._touched.update(dict.fromkeys(slots, fence))

    def fences(self, slots: Iterable[int]) -> tuple[Event, ...]:
        """Returns the events that the next writer of these slots must wait for (rule 7)."""
        touched = self._touched
        # Mostly one step touched many of them, and to ask a GPU's event takes a call of the driver.
        events = dict.fromkeys(touched.pop(slot) for slot in slots if slot in touched)
        return tuple(event for event in events if not event.query())


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

    def sort(self, block: Block, idle: bool) -> None:
        """Lists a block as spare, or not, by its references and holders.

        Args:
            block: Any.
            idle: It has a slot, and no copy in flight reads or writes it.
        """
        wanted = None
        if idle:
            if block.holders:
                wanted = self._held
            elif not block.refs:
                wanted = self._unreferenced
        listed = block.spare_in
        if wanted is listed:
            return
        if listed is not None:
            del listed[block]
        if wanted is not None:
            wanted[block] = None
        block.spare_in = wanted

    def pop_spare(self, *, held_too: bool) -> Block | None:
        """Returns the longest spare block, unreferenced ones first; it is spare no more."""
        queue = self._unreferenced
        if not queue and held_too:
            queue = self._held
        if not queue:
            return None
        block, _ = queue.popitem(last=False)
        block.spare_in = None
        return block

    def give_back(self, block: Block) -> None:
        """Frees a block's slot."""
        assert block.host is not None
        self.sort(block, idle=False)
        heapq.heappush(self.free, block.host)
        block.host = None
        block.stored_tokens = 0
