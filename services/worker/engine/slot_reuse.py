"""Which block's slot may be reused, and what is lost when it is.

A block's slots are reused by what it is then: referenced, held, clean, part of a copy. Whoever
changes any of that calls `SlotReuse.settle`.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable

from services.worker.engine.block import Block
from services.worker.engine.slots import DeviceSlots, HostSlots
from services.worker.messages import PoolState


class SlotReuse:
    """Hands out the slots of both pools: free ones, then those of blocks that can spare theirs.

    Args:
        device_slots: Slots in the device pool.
        host_slots: Slots in the host pool that can be used by now.

    Attributes:
        device: The device pool's slots.
        host: The host pool's slots.
        index: The prefix index: blocks by `content_hash`, until they have no slot left.
    """

    def __init__(self, device_slots: int, host_slots: int) -> None:
        self.device = DeviceSlots(device_slots)
        self.host = HostSlots(host_slots)
        self.index: dict[bytes, Block] = {}
        # In no table and not in the index, but still part of a copy.
        self._orphans: set[Block] = set()
        # Part of a copy.
        self._moving: set[Block] = set()

    def available_device(self) -> int:
        """Returns how many device slots can be had at once, free or by reuse."""
        return len(self.device.free) + self.device.reclaimable

    def coming_device(self) -> int:
        """Returns how many device slots are available or may be once the copies in flight end."""
        return self.available_device() + self._moving_unheld()

    def _moving_unheld(self) -> int:
        return sum(not block.holders for block in self._moving)

    # --- a block has changed ---------------------------------------------------------------------

    def settle(self, blocks: Iterable[Block]) -> None:
        """Brings blocks' places among what may be reused in line with their state."""
        moving = self._moving
        reclaimable: list[Block] = []
        for block in blocks:
            if not block.refs and block.content_hash is None:
                self._bury(block)
                continue
            copying = block.load is not None or block.stores > 0
            if copying:
                moving.add(block)
            else:
                moving.discard(block)
            if (
                block.device is not None
                and not block.holders
                and (not block.refs or block.clean)
                and not (copying and self._device_busy(block))
            ):
                if block.reclaim_rank is None:
                    reclaimable.append(block)
            elif block.reclaim_rank is not None:
                self.device.unrank(block)
            self.host.sort(
                block, block.host is not None and not (copying and self._host_busy(block))
            )
        if reclaimable:
            self.device.rank(reclaimable)

    def _bury(self, block: Block) -> None:
        """Frees the slots of a block that nobody can ever ask for again, once no copy uses them."""
        if block.device is not None and not self._device_busy(block):
            self.device.give_back(block)
        if block.host is not None and not self._host_busy(block):
            self.host.give_back(block)
        if block.device is None and block.host is None:
            self._orphans.discard(block)
        else:
            self._orphans.add(block)
        if block.load is None and not block.stores:
            self._moving.discard(block)

    @staticmethod
    def _store_reads_device(block: Block) -> bool:
        """Rule 3: a device slot is not handed out while a store reads it."""
        return block.stores > 0

    @staticmethod
    def _load_writes_device(block: Block) -> bool:
        """Rule 4: a device slot is not handed out while a load still writes it."""
        return block.load is not None

    @staticmethod
    def _load_reads_host(block: Block) -> bool:
        """Rule 5: a host slot is not handed out while a load reads it."""
        return block.load is not None

    @staticmethod
    def _store_writes_host(block: Block) -> bool:
        """Rule 6: a host slot is not handed out while a store still writes it."""
        return block.stores > 0

    def _device_busy(self, block: Block) -> bool:
        return self._store_reads_device(block) or self._load_writes_device(block)

    def _host_busy(self, block: Block) -> bool:
        return self._load_reads_host(block) or self._store_writes_host(block)

    # --- handing slots out -----------------------------------------------------------------------

    def take_device(self, count: int) -> list[int]:
        """Returns device slots; the caller has checked that there are as many."""
        free = self.device.free
        slots = [heapq.heappop(free) for _ in range(min(count, len(free)))]
        robbed = [self.device.pop_ranked() for _ in range(count - len(slots))]
        for block in robbed:
            assert block.device is not None
            slots.append(block.device)
            block.device = None
            if block.host is not None and not block.clean:
                # Nobody references it, and half a copy is worth nothing.
                self.host.give_back(block)
            self._forget_if_nowhere(block)
        self.settle(robbed)
        return slots

    def take_host(self, *, give_up_copies: bool) -> int | None:
        """Returns a host slot; None if none is free or spare.

        Args:
            give_up_copies: Take it from a block that is held on the device too.
        """
        if self.host.free:
            return heapq.heappop(self.host.free)
        return self._take_spare_host(give_up_copies)

    def give_up_copies(self, target_free: int) -> None:
        """Frees host copies that cost nobody's KV until `target_free` host slots are free."""
        while len(self.host.free) < target_free:
            slot = self._take_spare_host(give_up_copies=True)
            if slot is None:
                return
            heapq.heappush(self.host.free, slot)

    def _take_spare_host(self, give_up_copies: bool) -> int | None:
        block = self.host.pop_spare(held_too=give_up_copies)
        if block is None:
            return None
        slot = block.host
        block.host = None
        block.stored_tokens = 0
        self._forget_if_nowhere(block)
        self.settle((block,))
        return slot

    def _forget_if_nowhere(self, block: Block) -> None:
        if block.refs == 0 and block.device is None and block.host is None:
            self.forget_content(block)

    def forget_content(self, block: Block) -> None:
        """Takes a block out of the prefix index, if it is there."""
        if block.content_hash is not None:
            del self.index[block.content_hash]
            block.content_hash = None

    # --- invariants ------------------------------------------------------------------------------

    def pool_states(self) -> tuple[PoolState, PoolState]:
        """Returns the device and the host pool's slots by use."""
        device, host = self.device, self.host
        device_moving, host_moving = self._moving_unheld(), len(self._moving)
        return (
            PoolState(
                total=device.total,
                free=len(device.free),
                used=device.total - len(device.free) - device.reclaimable - device_moving,
                reclaimable=device.reclaimable,
                in_flight=device_moving,
            ),
            PoolState(
                total=host.total,
                free=len(host.free),
                used=host.total - len(host.free) - host.spare - host_moving,
                reclaimable=host.spare,
                in_flight=host_moving,
            ),
        )

    def untabled(self) -> set[Block]:
        """Returns the blocks that may be in no table and have slots all the same."""
        return self._orphans.union(self.index.values())

    def check_integrity(self, blocks: Collection[Block]) -> None:
        """Raises `AssertionError` if a slot is lost or shared, or a block is not settled.

        Args:
            blocks: All that have a slot.
        """
        for name, owned, free, total in (
            ("device", [b.device for b in blocks], self.device.free, self.device.total),
            ("host", [b.host for b in blocks], self.host.free, self.host.total),
        ):
            slots = [slot for slot in owned if slot is not None] + free
            assert sorted(slots) == list(range(total)), f"{name} slots lost or shared: {slots}"
        moving = {block for block in blocks if block.load is not None or block.stores}
        assert all(block.host is not None and block.device is not None for block in moving)
        assert self._moving == moving
        assert self.device.reclaimable == sum(b.reclaim_rank is not None for b in blocks)
        assert self.host.spare == sum(b.spare_in is not None for b in blocks)
