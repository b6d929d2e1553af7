"""Which block of KV is where, who needs it there, and what may be reused.

Pure bookkeeping: it hands out slots and says what to copy, and moves no byte itself. The engine
carries its `CopyTicket`s out and reports them with `finish`.

Ordering. KV is corrupted when a slot is reused or read too early, so there are seven rules. Rules
1 and 7 are fences, events of launched steps that a copy has to wait for; rule 2 is `loaded`; rules
3 to 6 are the four methods from `_store_reads_device` on.
"""

from __future__ import annotations

import heapq
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence

from services.worker.engine.block import (
    Block,
    BlockCopy,
    BlockTable,
    CopyTicket,
    Direction,
    Hold,
)
from services.worker.engine.slots import DeviceSlots, HostSlots
from services.worker.engine.streams import Event
from services.worker.messages import PoolState, Residency


class BlockManager:
    """Hands out the slots of both pools.

    Args:
        device_slots: Slots in the device pool.
        host_slots: Slots in the host pool that can be used by now; may be 0.
        block_size_tokens: Tokens per block.
    """

    def __init__(self, device_slots: int, host_slots: int, block_size_tokens: int) -> None:
        self.block_size_tokens = block_size_tokens
        self.fence: Event | None = None
        self._device = DeviceSlots(device_slots)
        self._host = HostSlots(host_slots)
        self._index: dict[bytes, Block] = {}
        # In no table and not in the index, but still part of a copy.
        self._orphans: set[Block] = set()
        # Part of a copy: on the device those that nobody holds, on the host all.
        self._moving_device: set[Block] = set()
        self._moving_host: set[Block] = set()

    # --- what there is ---------------------------------------------------------------------------

    @property
    def device_slots(self) -> int:
        """Slots in the device pool."""
        return self._device.total

    @property
    def host_slots(self) -> int:
        """Slots in the host pool."""
        return self._host.total

    def available_device(self) -> int:
        """Returns how many device slots can be had at once, free or by reuse."""
        return len(self._device.free) + self._device.reclaimable

    def coming_device(self) -> int:
        """Returns how many device slots are available or may be once the copies in flight end."""
        return self.available_device() + len(self._moving_device)

    def free_host(self) -> int:
        """Returns how many host slots hold nothing."""
        return len(self._host.free)

    def available_host(self) -> int:
        """Returns how many host slots can be had without losing any session's KV."""
        return len(self._host.free) + self._host.spare

    def blocks_for(self, tokens: int) -> int:
        """Returns how many blocks `tokens` tokens fill."""
        return -(-tokens // self.block_size_tokens)

    @staticmethod
    def missing(table: BlockTable) -> int:
        """Returns how many of the table's blocks have no device slot."""
        return sum(block.device is None for block in table.blocks)

    def room_needed(self, table: BlockTable, more_blocks: int = 0) -> int:
        """Returns how many blocks must be available to hold a table and add `more_blocks` to it."""
        if table.held:
            return more_blocks
        own = sum(block.reclaim_rank is not None for block in table.blocks)
        return self.missing(table) + own + more_blocks

    @staticmethod
    def loaded(table: BlockTable) -> bool:
        """Returns True if every block can be read on the device by a step launched now (rule 2)."""
        return not any(block.loads for block in table.blocks)

    @staticmethod
    def residency(table: BlockTable, context_length: int) -> Residency:
        """Returns where a session's KV lies.

        Args:
            table: The session's.
            context_length: Tokens in its log.
        """
        return Residency(
            total_blocks=len(table.blocks),
            device_blocks=sum(b.device is not None and not b.loads for b in table.blocks),
            host_blocks=sum(b.clean for b in table.blocks),
            missing_tokens=context_length - table.tokens,
            resident=table.held,
        )

    # --- growing and cutting a table -------------------------------------------------------------

    def match(self, table: BlockTable, hashes: Sequence[bytes], most_tokens: int) -> int:
        """Extends a table that ends at a full block by blocks of the prefix index.

        Args:
            table: Mutated; must not be held.
            hashes: Of the context's full blocks.
            most_tokens: The table will not hold more.

        Returns:
            Tokens found.
        """
        assert not table.held
        before = table.tokens
        if before % self.block_size_tokens:
            return 0
        for content_hash in hashes[len(table.blocks) : most_tokens // self.block_size_tokens]:
            block = self._index.get(content_hash)
            if block is None:
                break
            block.refs += 1
            table.blocks.append(block)
            table.tokens += self.block_size_tokens
            self._settle(block)
        return table.tokens - before

    def reserve(self, table: BlockTable, tokens: int) -> bool:
        """Gives a held table device slots for `tokens` tokens.

        They have to be filled by the next step, so `advance` follows.

        Returns:
            False, with nothing changed, if there are not enough.
        """
        assert table.held
        need = self.blocks_for(tokens) - len(table.blocks)
        if need > self.available_device():
            return False
        for _ in range(need):
            slot = self._take_device()
            table.blocks.append(Block(device=slot, refs=1, holders=1))
            table.slots.append(slot)
        return True

    def advance(self, table: BlockTable, tokens: int) -> list[Block]:
        """Counts `tokens` tokens as written by the step just launched, which `fence` is of.

        Returns:
            The blocks that it fills.
        """
        filled = []
        size = self.block_size_tokens
        for index in range(table.tokens // size, self.blocks_for(tokens)):
            block = table.blocks[index]
            block.filled_tokens = min(size, tokens - index * size)
            if block.filled_tokens == size:
                filled.append(block)
        table.tokens = tokens
        return filled

    def publish(self, table: BlockTable, index: int, content_hash: bytes) -> None:
        """Makes a full block, the step that wrote it done, known to other sessions.

        If a block of the same content is known already, the table takes that one instead.
        """
        block = table.blocks[index]
        if block.content_hash is not None:
            return
        twin = self._index.get(content_hash)
        if twin is None:
            block.content_hash = content_hash
            self._index[content_hash] = block
        elif table.held and twin.device is not None and not twin.loads:
            twin.refs += 1
            twin.holders += 1
            self._settle(twin)
            table.blocks[index] = twin
            table.slots[index] = twin.device
            self._let_go(block, holding=True)

    def truncate(self, table: BlockTable, tokens: int) -> None:
        """Cuts a table so that it holds at most `tokens` tokens.

        A full block never changes, so a cut inside one loses all of it.
        """
        if tokens >= table.tokens:
            return
        size = self.block_size_tokens
        keep = tokens // size
        if tokens % size and table.blocks[keep].filled_tokens < size:
            tail = table.blocks[keep]
            tail.filled_tokens = tokens % size
            tail.stored_tokens = min(tail.stored_tokens, tail.filled_tokens)
            tail.store = None
            keep += 1
            table.tokens = tokens
            self._settle(tail)
        else:
            table.tokens = keep * size
        self.drop(table, keep)

    def drop(self, table: BlockTable, keep_blocks: int = 0) -> None:
        """Forgets a table's blocks after its first `keep_blocks`."""
        gone = table.blocks[keep_blocks:]
        del table.blocks[keep_blocks:]
        del table.slots[keep_blocks:]
        table.tokens = min(table.tokens, keep_blocks * self.block_size_tokens)
        for block in gone:
            self._let_go(block, holding=table.held)
        if not table.blocks and not table.tokens:
            table.held = False

    def discard(self, table: BlockTable) -> None:
        """Forgets a table's blocks, and that others may find them: their content is worthless."""
        for block in table.blocks:
            if block.content_hash is not None:
                del self._index[block.content_hash]
                block.content_hash = None
        self.drop(table)

    # --- moving a table between the tiers --------------------------------------------------------

    def hold(self, table: BlockTable) -> Hold | None:
        """Holds a table's blocks on the device, taking back what is still there.

        The table may be read by a step once `loaded` says so.

        Returns:
            What it took, or None, with nothing changed, if there is no room.
        """
        if table.held:
            return Hold(0, None)
        if self.available_device() < self.room_needed(table):
            return None
        table.held = True
        resident = 0
        for block in table.blocks:
            block.holders += 1
            if block.device is not None:
                resident += 1
                self._settle(block)
        copies = []
        for block in table.blocks:
            if block.device is None:
                assert block.host is not None
                block.device = self._take_device()
                block.loads += 1
                copies.append(BlockCopy(block, block.device, block.host, block.stored_tokens))
                self._settle(block)
        table.slots = array("i", (_device_slot(block) for block in table.blocks))
        if not copies:
            return Hold(resident, None)
        fences = self._device.fences(copy.device for copy in copies)
        return Hold(resident, CopyTicket(Direction.LOAD, tuple(copies), fences))

    def unhold(self, table: BlockTable) -> None:
        """Lets a table's device blocks go: the clean ones may be reused from now on."""
        if not table.held:
            return
        table.held = False
        for block in table.blocks:
            block.expected_wake_ns = table.expected_wake_ns
            self._release(block)
            self._settle(block)

    def set_wake(self, table: BlockTable, expected_wake_ns: int | None) -> None:
        """Changes when a table is expected to be needed, and so the order of reuse."""
        table.expected_wake_ns = expected_wake_ns
        if table.held:
            return
        for block in table.blocks:
            block.expected_wake_ns = expected_wake_ns
            if block.reclaim_rank is not None:
                self._device.unrank(block)
                self._settle(block)

    def store(
        self, blocks: Iterable[Block], *, give_up_copies: bool, fence: Event | None = None
    ) -> CopyTicket | None:
        """Starts to make dirty blocks clean, as many as host slots can be had for.

        Args:
            blocks: Any; those that are clean or about to be are left alone.
            give_up_copies: Take host slots from blocks that are held on the device too.
            fence: Event of the step that wrote them, if it may still run (rule 1).

        Returns:
            The stores to carry out; None if there are none.
        """
        copies = []
        for block in blocks:
            if block.device is None or block.clean or block.store is not None or block.loads:
                continue
            if block.host is None:
                block.host = self._take_host(give_up_copies)
                if block.host is None:
                    break
                block.stored_tokens = 0
            copies.append(BlockCopy(block, block.device, block.host, block.filled_tokens))
            # Marked at once, so that the next slot taken is not this one.
            block.stores += 1
            self._settle(block)
        if not copies:
            return None
        ticket = CopyTicket(
            Direction.STORE, tuple(copies), () if fence is None or fence.query() else (fence,)
        )
        for copy in copies:
            copy.block.store = ticket
        return ticket

    def finish(self, ticket: CopyTicket) -> None:
        """Takes in that a ticket's copies are done."""
        for copy in ticket.copies:
            block = copy.block
            if ticket.direction is Direction.LOAD:
                block.loads -= 1
            else:
                block.stores -= 1
                if block.store is ticket:
                    block.store = None
                    block.stored_tokens = copy.tokens
            self._settle(block)

    def release_device(self, table: BlockTable) -> list[int]:
        """Frees the device slots of a table's blocks that may be reused, at once.

        Returns:
            The slots, which hold the old content until their next owner writes.
        """
        slots = []
        for block in table.blocks:
            if block.reclaim_rank is not None and block.device is not None:
                slots.append(block.device)
                self._device.give_back(block)
                self._settle(block)
        return slots

    def touch(self, slots: Iterable[int], fence: Event) -> None:
        """Makes the next load into these device slots wait for `fence` (rule 7)."""
        self._device.touch(slots, fence)

    def grow_host(self, slots: int) -> None:
        """Lets the first `slots` slots of the host pool be used."""
        self._host.grow(slots)

    def give_up_copies(self, target_free: int) -> None:
        """Frees host copies that cost nobody's KV until `target_free` host slots are free."""
        while len(self._host.free) < target_free:
            slot = self._take_spare_host(give_up_copies=True)
            if slot is None:
                return
            heapq.heappush(self._host.free, slot)

    # --- what may be reused ----------------------------------------------------------------------

    @staticmethod
    def _store_reads_device(block: Block) -> bool:
        """Rule 3: a device slot is not handed out while a store reads it."""
        return block.stores > 0

    @staticmethod
    def _load_writes_device(block: Block) -> bool:
        """Rule 4: a device slot is not handed out while a load still writes it."""
        return block.loads > 0

    @staticmethod
    def _load_reads_host(block: Block) -> bool:
        """Rule 5: a host slot is not handed out while a load reads it."""
        return block.loads > 0

    @staticmethod
    def _store_writes_host(block: Block) -> bool:
        """Rule 6: a host slot is not handed out while a store still writes it."""
        return block.stores > 0

    def _device_busy(self, block: Block) -> bool:
        return self._store_reads_device(block) or self._load_writes_device(block)

    def _host_busy(self, block: Block) -> bool:
        return self._load_reads_host(block) or self._store_writes_host(block)

    def _settle(self, block: Block) -> None:
        """Brings a block's place among what may be reused in line with its state."""
        if block.refs == 0 and block.content_hash is None:
            self._bury(block)
            return
        reusable = (
            block.device is not None
            and block.holders == 0
            and (block.refs == 0 or block.clean)
            and not self._device_busy(block)
        )
        if reusable:
            self._device.rank(block)
        else:
            self._device.unrank(block)
        self._host.sort(block, idle=block.host is not None and not self._host_busy(block))
        self._count_moving(block)

    def _bury(self, block: Block) -> None:
        """Frees the slots of a block that nobody can ever ask for again, once no copy uses them."""
        if block.device is not None and not self._device_busy(block):
            self._device.give_back(block)
        if block.host is not None and not self._host_busy(block):
            self._host.sort(block, idle=False)
            self._host.give_back(block)
        _include(self._orphans, block, block.device is not None or block.host is not None)
        self._count_moving(block)

    def _count_moving(self, block: Block) -> None:
        moving = bool(block.loads or block.stores)
        unheld = block.device is not None and block.holders == 0
        _include(self._moving_device, block, moving and unheld)
        _include(self._moving_host, block, moving and block.host is not None)

    def _release(self, block: Block) -> None:
        """Takes a holder away from a block; whoever held it may be in a step that still runs."""
        block.holders -= 1
        if block.holders == 0 and block.device is not None and self.fence is not None:
            self._device.touch((block.device,), self.fence)

    def _let_go(self, block: Block, *, holding: bool) -> None:
        block.refs -= 1
        if holding:
            self._release(block)
        if block.refs == 0:
            self._device.unrank(block)  # it ranks anew, as unreferenced
        self._settle(block)

    def _take_device(self) -> int:
        """Returns a device slot; the caller has checked that there is one."""
        if self._device.free:
            return heapq.heappop(self._device.free)
        block = self._device.pop_ranked()
        slot = block.device
        assert slot is not None
        block.device = None
        if block.host is not None and not block.clean:
            # Nobody references it, and half a copy is worth nothing.
            self._host.give_back(block)
        self._forget_if_nowhere(block)
        self._settle(block)
        return slot

    def _take_host(self, give_up_copies: bool) -> int | None:
        if self._host.free:
            return heapq.heappop(self._host.free)
        return self._take_spare_host(give_up_copies)

    def _take_spare_host(self, give_up_copies: bool) -> int | None:
        block = self._host.pop_spare(held_too=give_up_copies)
        if block is None:
            return None
        slot = block.host
        block.host = None
        block.stored_tokens = 0
        self._forget_if_nowhere(block)
        self._settle(block)
        return slot

    def _forget_if_nowhere(self, block: Block) -> None:
        if (
            block.refs == 0
            and block.device is None
            and block.host is None
            and block.content_hash is not None
        ):
            del self._index[block.content_hash]
            block.content_hash = None

    # --- invariants ------------------------------------------------------------------------------

    def pool_states(self) -> tuple[PoolState, PoolState]:
        """Returns the device and the host pool's slots by use."""
        device, host = self._device, self._host
        device_moving, host_moving = len(self._moving_device), len(self._moving_host)
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

    def _all_blocks(self, tables: Iterable[BlockTable]) -> set[Block]:
        blocks = self._orphans.union(self._index.values())
        for table in tables:
            blocks.update(table.blocks)
        return blocks

    def check_integrity(
        self, tables: Sequence[BlockTable], in_flight: Iterable[CopyTicket] = ()
    ) -> None:
        """Raises `AssertionError` if the bookkeeping contradicts itself.

        Args:
            tables: Every table there is.
            in_flight: Every ticket given out and not finished.
        """
        blocks = self._all_blocks(tables)
        loads: dict[Block, int] = {}
        stores: dict[Block, int] = {}
        for ticket in in_flight:
            counts = loads if ticket.direction is Direction.LOAD else stores
            for copy in ticket.copies:
                counts[copy.block] = counts.get(copy.block, 0) + 1
                blocks.add(copy.block)
        for name, owned, free, total in (
            ("device", [b.device for b in blocks], self._device.free, self.device_slots),
            ("host", [b.host for b in blocks], self._host.free, self.host_slots),
        ):
            slots = [slot for slot in owned if slot is not None] + free
            assert sorted(slots) == list(range(total)), f"{name} slots lost or shared: {slots}"
        refs = Counter(block for table in tables for block in table.blocks)
        holders = Counter(block for table in tables if table.held for block in table.blocks)
        for block in blocks:
            assert (block.refs, block.holders) == (refs[block], holders[block]), block
            assert block.loads == loads.get(block, 0), block
            assert block.stores == stores.get(block, 0), block
            assert not block.holders or block.device is not None, block
            assert not block.refs or block.device is not None or block.clean, block
            assert block.stored_tokens <= block.filled_tokens, block
        moving = {block for block in blocks if block.loads or block.stores}
        assert self._moving_host == {block for block in moving if block.host is not None}
        assert self._moving_device == {
            block for block in moving if block.device is not None and block.holders == 0
        }
        assert self._device.reclaimable == sum(b.reclaim_rank is not None for b in blocks)
        for table in tables:
            size = self.block_size_tokens
            filled = sum(block.filled_tokens for block in table.blocks)
            assert filled == table.tokens, (filled, table.tokens)
            assert not table.held or list(table.slots) == [b.device for b in table.blocks]
            assert all(b.filled_tokens == size for b in table.blocks[: table.tokens // size])


def _device_slot(block: Block) -> int:
    assert block.device is not None
    return block.device


def _include(blocks: set[Block], block: Block, wanted: bool) -> None:
    if wanted:
        blocks.add(block)
    else:
        blocks.discard(block)
