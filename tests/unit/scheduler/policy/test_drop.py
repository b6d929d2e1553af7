from __future__ import annotations

import pytest

from services.scheduler.domain import Drop, PoolState, Residency
from services.scheduler.policy import drop
from tests.support.policy_views import session, worker

NOW_S = 100.0
FULL = worker(free=0, host_free=0)


def waits(name, length_s, blocks=4, **fields):
    fields.setdefault("kv", Residency(blocks, 0, blocks, 0, resident=False))
    return session(name, expected_wake_s=NOW_S + length_s, context_length=16 * blocks, **fields)


def chosen(worker_view, *sessions):
    commands = drop.choose(worker_view, sessions, NOW_S + 10, NOW_S)
    assert all(command.action == Drop() for command in commands)
    return [command.session_id for command in commands]


@pytest.mark.parametrize(
    "roomy",
    [
        worker(free=50, host_free=0),
        worker(free=0, host_free=50),
        worker(free=0, host=PoolState(400, 0, 300, 100)),
        worker(free=0, host=PoolState()),
        worker(free=0, host_free=0, dropped_blocks=8),
    ],
)
def test_nothing_is_dropped_while_there_is_room_in_either_pool(roomy):
    assert chosen(roomy, waits("a", 1000)) == []


def test_the_furthest_wake_is_dropped_and_no_more_than_is_needed():
    # 2 % of 400 host blocks are wanted: two sessions of 4.
    away = [waits("d", 4000), waits("c", 300), waits("b", 20), waits("a", 10)]
    assert chosen(FULL, *away) == ["d", "c"]


def test_of_two_that_wake_together_the_cheaper_to_compute_goes():
    # The same tokens in more blocks: more room for the same loss.
    dense = waits("dense", 100, kv=Residency(4, 0, 4, 0, resident=False))
    sparse = session(
        "sparse",
        expected_wake_s=NOW_S + 100,
        context_length=64,
        kv=Residency(16, 0, 16, 0, resident=False),
    )
    assert chosen(FULL, dense, sparse) == ["sparse"]


def test_what_moves_or_runs_or_is_not_there_is_left_alone():
    assert not chosen(
        FULL,
        waits("moving", 100, moving="restore"),
        waits("running", 100, generating=True),
        waits("dropped", 100, kv=Residency(missing_tokens=64)),
    )


def test_at_most_a_few_are_looked_at_and_dropped():
    away = [waits(f"s{n}", 1000 - n) for n in range(100)]
    huge = worker(free=0, host=PoolState(100_000, 0, 100_000))
    names = chosen(huge, *away)
    assert len(names) == drop.AT_ONCE
    assert set(names) <= {f"s{n}" for n in range(drop.LOOKED_AT)}
