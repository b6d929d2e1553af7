from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.scheduler.domain import PoolState, Residency
from services.scheduler.forecast import SHARES, Source, WakeForecast
from services.scheduler.policy import cost
from services.scheduler.policy.cost import Choice, costs
from tests.support.policy_views import session, worker

NOW_S = 100.0


def waiting(length_s: float, **fields):
    shape = tuple(length_s * (0.99 + 0.02 * share) for share in SHARES)
    return session(forecast=WakeForecast(NOW_S, 1.0, shape, Source.TOOL), **fields)


def test_where_there_is_room_nothing_costs_but_to_drop():
    found = costs(waiting(10), worker(), NOW_S + 10, NOW_S)
    assert (found.keep_s, found.evict_s) == (0.0, 0.0)
    assert found.drop_s == pytest.approx(64 / 1e3)
    assert found.best is Choice.KEEP


def test_the_speeds_are_the_workers_own():
    found = costs(waiting(10), worker(), None, NOW_S)
    assert found.load_s == pytest.approx(4 * 1e6 / 1e9)
    assert found.prefill_s == pytest.approx(64 / 1e3)
    assert found.measured
    unmeasured = costs(waiting(10), worker(load_bytes_per_s=0.0), None, NOW_S)
    assert not unmeasured.measured
    assert unmeasured.load_s == pytest.approx(4 * 1e6 / cost.ASSUMED_LOAD_BYTES_PER_S)


def test_without_room_those_are_kept_that_wake_sooner_than_the_middle_one():
    full = worker(free=0)
    assert costs(waiting(5), full, NOW_S + 10, NOW_S).best is Choice.KEEP
    assert costs(waiting(20), full, NOW_S + 10, NOW_S).best is Choice.EVICT


def test_with_both_pools_full_the_furthest_are_dropped():
    full = worker(free=0, host_free=0)
    assert costs(waiting(5), full, NOW_S + 10, NOW_S).best is Choice.KEEP
    assert costs(waiting(300), full, NOW_S + 10, NOW_S).best is Choice.DROP


def test_whoever_runs_is_delayed_by_a_prefill_and_hardly_by_a_load():
    quiet = costs(waiting(20), worker(free=0), NOW_S + 10, NOW_S)
    busy = costs(waiting(20), worker(free=0, running_sequences=10), NOW_S + 10, NOW_S)
    assert busy.drop_s == pytest.approx(11 * quiet.drop_s)
    assert busy.evict_s == pytest.approx(1.3 * quiet.evict_s)


def test_a_queue_on_the_link_speaks_against_loading():
    quiet = costs(waiting(20), worker(free=0), NOW_S + 10, NOW_S)
    queued = costs(waiting(20), worker(free=0, loads_in_flight=50), NOW_S + 10, NOW_S)
    assert quiet.best is Choice.EVICT
    assert queued.evict_s == pytest.approx(51 * quiet.evict_s)
    assert queued.drop_s == quiet.drop_s


def test_of_whom_nothing_is_known_the_longest_idle_is_expected_last():
    assert cost.remaining(session(last_active_s=50.0), NOW_S) == 50.0
    assert cost.remaining(session(last_active_s=99.0), NOW_S) == cost.ASSUMED_WAIT_S
    assert cost.remaining(session(expected_wake_s=103.0), NOW_S) == 3.0


@pytest.mark.parametrize(
    ("free", "reclaimable", "expected"), [(100, 0, 0), (10, 0, 0), (0, 5, 0.5), (0, 0, 1)]
)
def test_pressure_begins_with_the_last_tenth(free, reclaimable, expected):
    pool = PoolState(100, free, 100 - free - reclaimable, reclaimable)
    assert cost.pressure(pool) == pytest.approx(expected)


def test_no_pool_at_all_is_a_full_one():
    assert cost.pressure(PoolState()) == 1.0


@given(
    st.floats(0.001, 1e5),
    st.integers(0, 100),
    st.integers(0, 400),
    st.integers(0, 64),
    st.none() | st.floats(0, 1e5),
    st.integers(0, 10_000),
)
def test_costs_are_never_negative_and_the_best_is_the_least(
    length_s, free, host_free, running, middle_s, blocks
):
    seen = waiting(length_s, kv=Residency(blocks, blocks, blocks, 0, False))
    full = worker(free=free, host_free=host_free, running_sequences=running)
    middle = None if middle_s is None else NOW_S + middle_s
    found = costs(seen, full, middle, NOW_S)
    ranked = {
        Choice.KEEP: found.keep_s,
        Choice.EVICT: found.evict_s,
        Choice.DROP: found.drop_s,
    }
    assert min(ranked.values()) >= 0
    assert ranked[found.best] == min(ranked.values())
