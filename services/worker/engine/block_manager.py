"""Which block of KV is where, who needs it there, and what may be reused.

Pure bookkeeping: it hands out slots and says what to copy, and moves no byte itself. The engine
carries its `CopyTicket`s out and reports them with `finish`.

Ordering. KV is corrupted when a slot is reused or read too early, so there are seven rules. Rules
1 and 7 are fences, events of launched steps that a copy has to wait for; rule 2 is `loaded`, or for
a step that is launched earlier the events of the loads (`StepPlan.after`); rules 3 to 6 are in
`slot_reuse`.
"""

from __future__ import annotations

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
from services.worker.engine.slot_reuse import SlotReuse
from services.worker.engine.streams import Event
from services.worker.messages import PoolState, Residency


class BlockManager:
    """Gives tables their blocks, and blocks their slots in both pools.

    Args:
        device_slots: Slots in the device pool.
        host_slots: Slots in the host pool that can be used by now; may be 0.
        block_size_tokens: Tokens per block.

    Attributes:
        block_size_tokens: Tokens per block.
        fence: Event of the step launched last; None before the first.
    """

    def __init__(self, device_slots: int, host_slots: int, block_size_tokens: int) -> None:
        self.block_size_tokens = block_size_tokens
        self.fence: Event | None = None
        self._reuse = SlotReuse(device_slots, host_slots)

    # --- what there is ---------------------------------------------------------------------------

    @property
    def device_slots(self) -> int:
        """Slots in the device pool."""
        return self._reuse.device.total

    @property
    def host_slots(self) -> int:
        """Slots in the host pool."""
        return self._reuse.host.total

    def available_device(self) -> int:
        """Returns how many device slots can be had at once, free or by reuse."""
        return self._reuse.available_device()

    def coming_device(self) -> int:
        """Returns how many device slots are available or may be once the copies in flight end."""
        return self._reuse.coming_device()

    def free_host(self) -> int:
        """Returns how many host slots hold nothing."""
        return len(self._reuse.host.free)

    def available_host(self) -> int:
        """Returns how many host slots can be had without losing any session's KV."""
        return len(self._reuse.host.free) + self._reuse.host.spare

    def pool_states(self) -> tuple[PoolState, PoolState]:
        """Returns the device and the host pool's slots by use."""
        return self._reuse.pool_states()

    def blocks_for(self, tokens: int) -> int:
        """Returns how many blocks `tokens` tokens fill."""
        return -(-tokens // self.block_size_tokens)

    @staticmethod
    def room_needed(table: BlockTable, more_blocks: int = 0) -> int:
        """Returns how many blocks must be available to hold a table and add `more_blocks` to it."""
        if table.held:
            return more_blocks
        return more_blocks + sum(
            block.device is None or block.reclaim_rank is not None for block in table.blocks
        )

    @staticmethod
    def loaded(table: BlockTable) -> bool:
        """Returns True if every block can be read on the device by a step launched now (rule 2)."""
        return not any(block.load is not None for block in table.blocks)

    @staticmethod
    def residency(table: BlockTable, context_length: int) -> Residency:
        """Returns where a session's KV lies.

        Args:
            table: The session's.
            context_length: Tokens in its log.
        """
        on_device = on_host = 0
        for block in table.blocks:
            on_device += block.device is not None and block.load is None
            on_host += block.clean
        return Residency(
            total_blocks=len(table.blocks),
            device_blocks=on_device,
            host_blocks=on_host,
            # The KV of a token that a step in flight samples may be there before the token.
            missing_tokens=max(context_length - table.tokens, 0),
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
            block = self._reuse.index.get(content_hash)
            if block is None:
                break
            block.refs += 1
            table.blocks.append(block)
            table.tokens += self.block_size_tokens
            self._reuse.settle((block,))
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
        slots = self._reuse.take_device(need)
        table.blocks.extend(Block(device=slot, refs=1, holders=1) for slot in slots)
        table.slots.extend(slots)
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
        twin = self._reuse.index.get(content_hash)
        if twin is None:
            block.content_hash = content_hash
            self._reuse.index[content_hash] = block
        elif table.held and twin.device is not None and twin.load is None:
            twin.refs += 1
            twin.holders += 1
            self._reuse.settle((twin,))
            table.blocks[index] = twin
            slot, table.slots[index] = table.slots[index], twin.device
            self._let_go([block], [slot])

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
            self._reuse.settle((tail,))
        else:
            table.tokens = keep * size
        self.drop(table, keep)

    def drop(self, table: BlockTable, keep_blocks: int = 0) -> None:
        """Forgets a table's blocks after its first `keep_blocks`."""
        gone, slots = table.blocks[keep_blocks:], table.slots[keep_blocks:]
        del table.blocks[keep_blocks:]
        del table.slots[keep_blocks:]
        table.tokens = min(table.tokens, keep_blocks * self.block_size_tokens)
        self._let_go(gone, slots if table.held else None)
        if not table.blocks and not table.tokens:
            table.held = False

    def discard(self, table: BlockTable) -> None:
        """Forgets a table's blocks, and that others may find them: their content is worthless."""
        for block in table.blocks:
            self._reuse.forget_content(block)
        self.drop(table)

    def _let_go(self, blocks: Sequence[Block], slots: Iterable[int] | None) -> None:
        """Takes in that blocks are gone from a table.

        Args:
            blocks: Those.
            slots: Their device slots if the table is held.
        """
        if slots is not None:
            self._release(blocks, slots)
        for block in blocks:
            block.refs -= 1
            if block.refs == 0:
                self._reuse.device.unrank(block)  # it ranks anew, as unreferenced
        # The last go first: a block is found only behind all those before it.
        self._reuse.settle(reversed(blocks))

    def _release(self, blocks: Iterable[Block], slots: Iterable[int]) -> None:
        """Takes a holder away from blocks; whoever held them may be in a step that still runs."""
        for block in blocks:
            block.holders -= 1
        if self.fence is not None:
            self._reuse.device.touch(slots, self.fence)

    # --- moving a table between the tiers --------------------------------------------------------

    def hold(self, table: BlockTable, more_blocks: int = 0) -> Hold | None:
        """Holds a table's blocks on the device, taking back what is still there.

        The table may be read by a step once `loaded` says so.

        Args:
            table: Not held; mutated.
            more_blocks: New blocks that there must be room for too.

        Returns:
            What it took, or None, with nothing changed, if there is no room.
        """
        assert not table.held
        if self.available_device() < self.room_needed(table, more_blocks):
            return None
        table.held = True
        missing: list[Block] = []
        others: dict[CopyTicket, None] = {}
        for block in table.blocks:
            block.holders += 1
            if block.device is None:
                missing.append(block)
                continue
            # Before slots are taken for the missing ones, lest it be this one's.
            self._reuse.device.unrank(block)
            if block.load is not None:
                others[block.load] = None
        ticket = self._load(missing) if missing else None
        self._reuse.settle(table.blocks)
        table.slots = array("i", [b.device for b in table.blocks if b.device is not None])
        return Hold(len(table.blocks) - len(missing), ticket, tuple(others))

    def _load(self, blocks: Sequence[Block]) -> CopyTicket:
        """Gives blocks of the host device slots to be loaded into; the caller settles them."""
        slots = self._reuse.take_device(len(blocks))
        copies = []
        for block, slot in zip(blocks, slots, strict=True):
            assert block.host is not None
            block.device = slot
            copies.append(BlockCopy(block, slot, block.host, block.stored_tokens))
        fences = self._reuse.device.fences(slots)
        ticket = CopyTicket(Direction.LOAD, tuple(copies), fences)
        for block in blocks:
            block.load = ticket
        return ticket

    def unhold(self, table: BlockTable) -> None:
        """Lets a table's device blocks go: the clean ones may be reused from now on."""
        if not table.held:
            return
        table.held = False
        self._release(table.blocks, table.slots)
        for block in table.blocks:
            block.expected_wake_ns = table.expected_wake_ns
        self._reuse.settle(table.blocks)

    def set_wake(self, table: BlockTable, expected_wake_ns: int | None) -> None:
        """Changes when a table is expected to be needed, and so the order of reuse."""
        table.expected_wake_ns = expected_wake_ns
        if table.held:
            return
        for block in table.blocks:
            block.expected_wake_ns = expected_wake_ns
            self._reuse.device.unrank(block)
        self._reuse.settle(table.blocks)

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
            if block.clean or block.store is not None or block.load is not None:
                continue
            assert block.device is not None
            if block.host is None:
                block.host = self._reuse.take_host(give_up_copies=give_up_copies)
                if block.host is None:
                    break
                block.stored_tokens = 0
            copies.append(BlockCopy(block, block.device, block.host, block.filled_tokens))
            # Marked at once, so that the next slot taken is not this one.
            block.stores += 1
            self._reuse.settle((block,))
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
                block.load = None
            else:
                block.stores -= 1
                if block.store is ticket:
                    block.store = None
                    block.stored_tokens = copy.tokens
        self._reuse.settle([copy.block for copy in ticket.copies])

    def release_device(self, table: BlockTable) -> list[int]:
        """Frees the device slots of a table's blocks that may be reused, at once.

        Returns:
            The slots, which hold the old content until their next owner writes.
        """
        slots = []
        for block in table.blocks:
            if block.reclaim_rank is not None and block.device is not None:
                slots.append(block.device)
                self._reuse.device.give_back(block)
                self._reuse.settle((block,))
        return slots

    def touch(self, slots: Iterable[int], fence: Event) -> None:
        """Makes the next load into these device slots wait for `fence` (rule 7)."""
        self._reuse.device.touch(slots, fence)

    def grow_host(self, slots: int) -> None:
        """Lets the first `slots` slots of the host pool be used."""
        self._reuse.host.grow(slots)

    def give_up_copies(self, target_free: int) -> None:
        """Frees host copies that cost nobody's KV until `target_free` host slots are free."""
        self._reuse.give_up_copies(target_free)

    # --- invariants ------------------------------------------------------------------------------

    def check_integrity(
        self, tables: Sequence[BlockTable], in_flight: Iterable[CopyTicket] = ()
    ) -> None:
        """Raises `AssertionError` if the bookkeeping contradicts itself.

        Args:
            tables: Every table there is.
            in_flight: Every ticket given out and not finished.
        """
        blocks = self._reuse.untabled()
        for table in tables:
            blocks.update(table.blocks)
        load_of: dict[Block, CopyTicket] = {}
        stores: Counter[Block] = Counter()
        for ticket in in_flight:
            for copy in ticket.copies:
                blocks.add(copy.block)
                if ticket.direction is Direction.STORE:
                    stores[copy.block] += 1
                else:
                    assert load_of.setdefault(copy.block, ticket) is ticket, "loaded twice at once"
        self._reuse.check_integrity(blocks)
        refs = Counter(block for table in tables for block in table.blocks)
        holders = Counter(block for table in tables if table.held for block in table.blocks)
        for block in blocks:
            assert (block.refs, block.holders) == (refs[block], holders[block]), block
            assert block.load is load_of.get(block), block
            assert block.stores == stores[block], block
            assert not block.holders or block.device is not None, block
            assert not block.refs or block.device is not None or block.clean, block
            assert block.stored_tokens <= block.filled_tokens, block
        for table in tables:
            size = self.block_size_tokens
            filled = sum(block.filled_tokens for block in table.blocks)
            assert filled == table.tokens, (filled, table.tokens)
            assert not table.held or list(table.slots) == [b.device for b in table.blocks]
            assert all(b.filled_tokens == size for b in table.blocks[: table.tokens // size])
