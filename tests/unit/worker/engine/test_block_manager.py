"""Slots handed out, taken back and accounted for, without an engine."""

from __future__ import annotations

import pytest

from services.worker.engine.block import BlockTable, hash_blocks
from services.worker.engine.block_manager import BlockManager
from services.worker.messages import PoolState

SIZE = 4


def manager(device: int = 8, host: int = 8) -> BlockManager:
    return BlockManager(device, host, SIZE)


def filled(blocks: BlockManager, tokens: int, wake_ns: int | None = None) -> BlockTable:
    """Returns a held table of `tokens` tokens."""
    table = BlockTable(expected_wake_ns=wake_ns)
    blocks.hold(table)
    assert blocks.reserve(table, tokens)
    blocks.advance(table, tokens)
    return table


def stored(blocks: BlockManager, table: BlockTable) -> None:
    ticket = blocks.store(table.blocks, give_up_copies=True)
    if ticket is not None:
        blocks.finish(ticket)


def test_a_block_is_dirty_then_clean_then_host_only() -> None:
    blocks = manager(device=2)
    table = filled(blocks, 6)
    assert [block.clean for block in table.blocks] == [False, False]
    stored(blocks, table)
    assert [block.clean for block in table.blocks] == [True, True]
    blocks.unhold(table)
    other = filled(blocks, 8)
    assert [(block.device, block.clean) for block in table.blocks] == [(None, True)] * 2
    blocks.check_integrity([table, other])


def test_a_partial_tail_is_stored_again_into_the_same_slot() -> None:
    blocks = manager()
    table = filled(blocks, 2)
    stored(blocks, table)
    slot = table.blocks[0].host
    blocks.advance(table, 3)
    assert not table.blocks[0].clean
    ticket = blocks.store(table.blocks, give_up_copies=True)
    assert ticket is not None
    assert [(copy.host, copy.tokens) for copy in ticket.copies] == [(slot, 3)]


def test_only_full_blocks_are_reported_as_filled() -> None:
    blocks = manager()
    table = BlockTable()
    blocks.hold(table)
    blocks.reserve(table, 10)
    assert blocks.advance(table, 7) == table.blocks[:1]
    assert blocks.advance(table, 10) == table.blocks[1:2]


def test_reserving_too_much_changes_nothing() -> None:
    blocks = manager(device=2)
    table = filled(blocks, 4)
    assert not blocks.reserve(table, 3 * SIZE)
    assert len(table.blocks) == 1
    blocks.check_integrity([table])


def test_the_furthest_wake_is_reused_first_and_an_unknown_one_counts_as_far() -> None:
    blocks = manager(device=4)
    tables = {wake: filled(blocks, SIZE, wake) for wake in (30, None, 10, 20)}
    for table in tables.values():
        stored(blocks, table)
        blocks.unhold(table)
    gone = []
    for _ in range(4):
        filled(blocks, SIZE)
        gone += [w for w, t in tables.items() if t.blocks[0].device is None and w not in gone]
    assert gone == [None, 30, 20, 10]


def test_a_new_hint_changes_the_order_of_reuse() -> None:
    blocks = manager(device=2)
    near, far = filled(blocks, SIZE, 10), filled(blocks, SIZE, 20)
    for table in (near, far):
        stored(blocks, table)
        blocks.unhold(table)
    blocks.set_wake(near, 30)
    filled(blocks, SIZE)
    assert near.blocks[0].device is None
    assert far.blocks[0].device is not None


def test_a_hold_takes_back_what_is_there_and_loads_the_rest() -> None:
    blocks = manager(device=3)
    table = filled(blocks, 3 * SIZE)
    stored(blocks, table)
    blocks.unhold(table)
    guest = filled(blocks, SIZE)
    blocks.drop(guest)
    hold = blocks.hold(table)
    assert hold is not None
    assert hold.resident_blocks == 2
    assert hold.ticket is not None
    assert len(hold.ticket.copies) == 1
    assert not blocks.loaded(table)
    blocks.finish(hold.ticket)
    assert blocks.loaded(table)


def test_a_hold_without_room_changes_nothing() -> None:
    blocks = manager(device=2)
    table = filled(blocks, 2 * SIZE)
    stored(blocks, table)
    blocks.unhold(table)
    guest = filled(blocks, SIZE)
    assert blocks.hold(table) is None
    assert not table.held
    blocks.check_integrity([table, guest])


def test_host_copies_of_what_stays_on_the_device_are_given_up_first() -> None:
    blocks = manager(host=2)
    held, leaving = filled(blocks, 2 * SIZE), filled(blocks, 2 * SIZE)
    stored(blocks, held)
    assert blocks.store(leaving.blocks, give_up_copies=False) is None
    blocks.unhold(leaving)
    stored(blocks, leaving)
    assert [block.clean for block in leaving.blocks] == [True, True]
    assert [block.clean for block in held.blocks] == [False, False]


def test_the_only_copy_of_anything_is_never_given_up() -> None:
    blocks = manager(device=4, host=2)
    away = filled(blocks, 2 * SIZE)
    stored(blocks, away)
    blocks.unhold(away)
    other = filled(blocks, 4 * SIZE)
    assert blocks.residency(away, away.tokens).device_blocks == 0
    assert blocks.store(other.blocks, give_up_copies=True) is None
    blocks.give_up_copies(2)
    assert blocks.free_host() == 0


def test_a_cut_inside_a_full_block_loses_all_of_it() -> None:
    blocks = manager()
    table = filled(blocks, 10)
    blocks.truncate(table, 9)
    assert (table.tokens, len(table.blocks)) == (9, 3)
    blocks.truncate(table, 7)
    assert (table.tokens, len(table.blocks)) == (4, 1)
    blocks.check_integrity([table])


def test_matching_stops_at_the_first_unknown_block_and_at_the_limit() -> None:
    blocks = manager()
    tokens = list(range(3 * SIZE))
    hashes: list[bytes] = []
    hash_blocks(tokens, SIZE, b"salt", hashes)
    table = filled(blocks, 3 * SIZE)
    blocks.publish(table, 0, hashes[0])
    blocks.publish(table, 1, hashes[1])
    for most, found in ((3 * SIZE, 2 * SIZE), (2 * SIZE - 1, SIZE), (SIZE - 1, 0)):
        assert blocks.match(BlockTable(), hashes, most) == found


def test_a_shared_block_is_kept_until_the_last_table_lets_it_go() -> None:
    blocks = manager()
    first = filled(blocks, SIZE)
    blocks.publish(first, 0, b"hash")
    second = BlockTable()
    blocks.match(second, [b"hash"], SIZE)
    blocks.hold(second)
    blocks.drop(first)
    assert blocks.available_device() == 7
    blocks.drop(second)
    assert blocks.available_device() == 8
    third = BlockTable()
    assert blocks.match(third, [b"hash"], SIZE) == SIZE, "unreferenced blocks stay findable"


def test_unreferenced_blocks_go_before_anybody_s() -> None:
    blocks = manager(device=2)
    cached = filled(blocks, SIZE)
    blocks.publish(cached, 0, b"hash")
    waiting = filled(blocks, SIZE)
    stored(blocks, waiting)
    blocks.unhold(waiting)
    blocks.drop(cached)
    filled(blocks, SIZE)
    assert waiting.blocks[0].device is not None
    assert blocks.match(BlockTable(), [b"hash"], SIZE) == 0


def test_pool_states_add_up_while_copies_are_in_flight() -> None:
    blocks = manager(device=4, host=4)
    table = filled(blocks, 2 * SIZE)
    ticket = blocks.store(table.blocks, give_up_copies=True)
    blocks.drop(table)
    device, host = blocks.pool_states()
    assert device == PoolState(total=4, free=2, in_flight=2)
    assert host == PoolState(total=4, free=2, in_flight=2)
    assert ticket is not None
    blocks.finish(ticket)
    assert blocks.pool_states()[0] == PoolState(total=4, free=4)


@pytest.mark.parametrize("salt", [b"one", b"two"])
def test_hashes_are_chained_and_salted(salt: bytes) -> None:
    known: list[bytes] = []
    hash_blocks([1, 2, 3, 4, 5, 6, 7, 8, 9], SIZE, salt, known)
    assert len(known) == 2
    other: list[bytes] = []
    hash_blocks([0, 2, 3, 4, 5, 6, 7, 8], SIZE, salt, other)
    assert not set(known) & set(other), "the second block's hash covers the first"
    foreign: list[bytes] = []
    hash_blocks([1, 2, 3, 4], SIZE, salt + b"!", foreign)
    assert foreign[0] != known[0]


def test_hashes_extend_what_is_known() -> None:
    tokens = list(range(12))
    whole: list[bytes] = []
    hash_blocks(tokens, SIZE, b"", whole)
    grown: list[bytes] = []
    for length in range(13):
        hash_blocks(tokens[:length], SIZE, b"", grown)
    assert grown == whole


def test_the_order_of_reuse_does_not_grow_with_every_sleep_and_wake() -> None:
    blocks = manager()
    table = filled(blocks, 4 * SIZE)
    stored(blocks, table)
    for _ in range(1000):
        blocks.unhold(table)
        blocks.hold(table)
    assert len(blocks._reuse.device._ranked) < 100


def test_host_slots_come_as_they_are_pinned() -> None:
    blocks = manager(host=0)
    table = filled(blocks, 2 * SIZE)
    assert blocks.store(table.blocks, give_up_copies=True) is None
    blocks.grow_host(1)
    blocks.grow_host(1)
    ticket = blocks.store(table.blocks, give_up_copies=True)
    assert ticket is not None
    assert [copy.host for copy in ticket.copies] == [0]
    blocks.check_integrity([table], [ticket])


def test_half_a_host_copy_is_freed_with_the_block_that_nobody_references() -> None:
    blocks = manager(device=2, host=2)
    table = filled(blocks, 2)
    stored(blocks, table)
    blocks.advance(table, SIZE)
    blocks.publish(table, 0, b"hash")
    blocks.drop(table)
    other = filled(blocks, 2 * SIZE)
    assert (blocks.free_host(), blocks.available_host()) == (2, 2)
    blocks.check_integrity([table, other])


def test_who_was_taken_back_and_let_go_again_is_reused_after_who_was_not() -> None:
    blocks = manager(device=4)
    first, second = filled(blocks, 2 * SIZE), filled(blocks, 2 * SIZE)
    for table in (first, second):
        stored(blocks, table)
        blocks.unhold(table)
    blocks.hold(first)
    blocks.unhold(first)
    filled(blocks, SIZE)
    assert [block.device is None for block in second.blocks] == [True, False]
    filled(blocks, 2 * SIZE)
    assert [block.device is None for block in first.blocks] == [True, False]


def test_a_hold_waits_for_what_another_s_load_brings() -> None:
    blocks = manager()
    first = filled(blocks, 2 * SIZE)
    blocks.publish(first, 0, b"hash")
    stored(blocks, first)
    blocks.unhold(first)
    blocks.release_device(first)
    second = BlockTable()
    blocks.match(second, [b"hash"], SIZE)
    bringing = blocks.hold(first)
    assert bringing is not None
    assert bringing.ticket is not None
    hold = blocks.hold(second)
    assert hold is not None
    assert (hold.resident_blocks, hold.ticket, hold.others) == (1, None, (bringing.ticket,))
    blocks.check_integrity([first, second], [bringing.ticket])


def test_events_of_touched_slots_are_asked_once_each() -> None:
    class Fence:
        asked = 0

        def query(self) -> bool:
            self.asked += 1
            return False

        def synchronize(self) -> None:
            raise AssertionError("nothing waits")

        def reached_ns(self) -> int:
            raise AssertionError("not reached")

    blocks = manager()
    table = filled(blocks, 4 * SIZE)
    stored(blocks, table)
    blocks.fence = fence = Fence()
    blocks.unhold(table)
    blocks.release_device(table)
    hold = blocks.hold(table)
    assert hold is not None
    assert hold.ticket is not None
    assert (hold.ticket.after, fence.asked) == ((fence,), 1)
