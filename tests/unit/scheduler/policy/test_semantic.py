from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.scheduler.domain import (
    NO_KV,
    Evict,
    Phase,
    PoolState,
    Residency,
    Restore,
    SetHint,
)
from services.scheduler.forecast import SHARES, Source, WakeForecast
from services.scheduler.policy.base import NOTHING, Cause
from services.scheduler.policy.options import PolicyOptions
from services.scheduler.policy.semantic import (
    LEARN_DELAY_S,
    LEARN_DELAY_SHARE,
    MAX_FAILURES,
    SIGNALLED_IDLE_FACTOR,
    Semantic,
)
from services.scheduler.policy.view import SessionView, SystemView, WorkerView

UNIFORM = WakeForecast(100.0, 1.0, tuple(10 + 10 * share for share in SHARES), Source.TOOL)
WORKER = WorkerView(
    "w0", "tiny", False, 1024, 16, PoolState(100, 0, 50, 50), PoolState(100, 50, 50), full_s=102.0
)
FULL = SystemView({"w0": WORKER})
CLEAN = Residency(4, 4, 4, 0, resident=False)
CLEAN_HERE = Residency(4, 4, 4, 0, resident=True)
RESIDENT = Residency(4, 4, 0, 0, resident=True)
ON_HOST = Residency(4, 0, 4, 0, resident=False)
SYSTEM = SystemView()
IDLE_S = 2.0

SESSION = SessionView(
    session_id="a",
    tenant_id="",
    priority=0,
    phase=Phase.OPEN,
    phase_since_s=100.0,
    tool_name="",
    expected_wake_s=None,
    worker_id="w0",
    connected=True,
    generating=False,
    context_length=64,
    last_active_s=100.0,
    kv=RESIDENT,
)


@pytest.fixture
def policy() -> Semantic:
    return Semantic(PolicyOptions(idle_threshold_s=IDLE_S))


def session(phase=Phase.OPEN, **fields) -> SessionView:
    return replace(SESSION, phase=phase, **fields)


def actions(decision) -> list[object]:
    return [command.action for command in decision.commands]


def test_a_tool_call_evicts_and_tells_when_the_agent_is_expected(policy):
    waiting = session(Phase.IO_WAIT, expected_wake_s=130.0)
    decision = policy.decide(Cause.SIGNAL, waiting, SYSTEM, 101.0)
    assert actions(decision) == [Evict(expected_wake_s=130.0)]
    # Told again then, should it not have woken.
    assert decision.review_at_s == 130.0
    assert decision.explanation is None


def test_a_wake_restores_also_what_seems_to_be_there(policy):
    for kv in (ON_HOST, RESIDENT):
        decision = policy.decide(Cause.SIGNAL, session(Phase.COMPUTE, kv=kv), SYSTEM, 101.0)
        assert actions(decision) == [Restore()]


def test_an_agent_that_wakes_and_then_does_nothing_is_evicted_after_a_while(policy):
    woken = session(Phase.COMPUTE, kv=ON_HOST, last_active_s=150.0)
    decision = policy.decide(Cause.SIGNAL, woken, SYSTEM, 150.0)
    assert decision.review_at_s == 150.0 + IDLE_S * SIGNALLED_IDLE_FACTOR
    restored = replace(woken, kv=RESIDENT)
    assert actions(policy.decide(Cause.REVIEW, restored, SYSTEM, decision.review_at_s)) == [Evict()]


def test_a_wake_supersedes_an_eviction_that_is_not_done(policy):
    waking = session(Phase.COMPUTE, moving="evict")
    assert actions(policy.decide(Cause.SIGNAL, waking, SYSTEM, 101.0)) == [Restore()]


def test_a_session_without_a_context_is_not_restored(policy):
    fresh = session(Phase.COMPUTE, kv=NO_KV, context_length=0)
    assert not actions(policy.decide(Cause.SIGNAL, fresh, SYSTEM, 101.0))


@pytest.mark.parametrize("phase", list(Phase)[:3])
@pytest.mark.parametrize("cause", list(Cause))
def test_nothing_is_done_while_it_generates(policy, phase, cause):
    decision = policy.decide(cause, session(phase, generating=True), SYSTEM, 101.0)
    assert not decision.commands
    assert decision.review_at_s is None
    assert decision.deferred == (phase is Phase.IO_WAIT)


@pytest.mark.parametrize("phase", list(Phase)[:3])
@pytest.mark.parametrize("cause", list(Cause))
def test_nothing_is_done_without_a_worker(policy, phase, cause):
    decision = policy.decide(cause, session(phase, connected=False), SYSTEM, 101.0)
    assert not decision.commands
    assert decision.review_at_s is None


def test_an_eviction_put_off_comes_when_the_generate_ends(policy):
    decision = policy.decide(Cause.GENERATE_FINISHED, session(Phase.IO_WAIT), SYSTEM, 101.0)
    assert actions(decision) == [Evict()]


def test_what_is_evicted_is_not_evicted_again(policy):
    for fields in ({"kv": ON_HOST}, {"moving": "evict"}):
        waiting = session(Phase.IO_WAIT, **fields)
        for cause in (Cause.GENERATE_FINISHED, Cause.MOVED, Cause.RECONNECTED, Cause.REVIEW):
            assert not policy.decide(cause, waiting, SYSTEM, 101.0).commands


def test_an_eviction_waits_for_the_first_context(policy):
    fresh = session(Phase.IO_WAIT, kv=NO_KV, context_length=0)
    decision = policy.decide(Cause.SIGNAL, fresh, SYSTEM, 101.0)
    assert not decision.commands
    assert decision.deferred


def test_a_stale_eviction_is_decided_again_at_once(policy):
    assert actions(policy.decide(Cause.STALE, session(Phase.IO_WAIT), SYSTEM, 101.0)) == [Evict()]


def test_failures_are_tried_again_ever_later_and_not_for_ever(policy):
    delays = []
    for failures in range(1, MAX_FAILURES + 1):
        waiting = session(Phase.IO_WAIT, failures=failures)
        decision = policy.decide(Cause.MOVE_FAILED, waiting, SYSTEM, 101.0)
        assert not decision.commands
        assert decision.review_at_s is not None
        delays.append(decision.review_at_s - 101.0)
    assert delays == sorted(delays)
    assert delays[0] > 0
    waiting = session(Phase.IO_WAIT, failures=MAX_FAILURES + 1)
    assert policy.decide(Cause.MOVE_FAILED, waiting, SYSTEM, 101.0).review_at_s is None


def test_a_failed_restore_is_tried_again_at_its_review(policy):
    woken = session(Phase.COMPUTE, kv=ON_HOST, last_active_s=101.0, failures=1)
    decision = policy.decide(Cause.MOVE_FAILED, woken, SYSTEM, 101.0)
    assert decision.review_at_s is not None
    review = policy.decide(Cause.REVIEW, woken, SYSTEM, decision.review_at_s)
    assert actions(review) == [Restore()]


def test_a_silent_session_is_evicted_after_the_idle_threshold(policy):
    silent = session(last_active_s=110.0)
    decision = policy.decide(Cause.GENERATE_FINISHED, silent, SYSTEM, 110.0)
    assert not decision.commands
    assert decision.review_at_s == 110.0 + IDLE_S
    review = policy.decide(Cause.REVIEW, silent, SYSTEM, decision.review_at_s)
    assert actions(review) == [Evict()]
    assert review.review_at_s is None


def test_a_silent_session_that_did_something_meanwhile_is_looked_at_later(policy):
    decision = policy.decide(Cause.REVIEW, session(last_active_s=111.0), SYSTEM, 112.0)
    assert not decision.commands
    assert decision.review_at_s == 113.0


def test_a_session_that_said_it_computes_is_given_longer(policy):
    woken = session(Phase.COMPUTE, last_active_s=110.0)
    decision = policy.decide(Cause.GENERATE_FINISHED, woken, SYSTEM, 110.0)
    assert decision.review_at_s == 110.0 + IDLE_S * SIGNALLED_IDLE_FACTOR
    review = policy.decide(Cause.REVIEW, woken, SYSTEM, decision.review_at_s)
    assert actions(review) == [Evict()]
    evicted = replace(woken, kv=ON_HOST)
    later = policy.decide(Cause.MOVED, evicted, SYSTEM, decision.review_at_s + 1)
    assert Evict() not in actions(later)


def test_after_a_reconnection_the_phase_is_made_true(policy):
    waiting = session(Phase.IO_WAIT, expected_wake_s=120.0)
    assert actions(policy.decide(Cause.RECONNECTED, waiting, SYSTEM, 101.0)) == [
        Evict(expected_wake_s=120.0)
    ]
    woken = session(Phase.COMPUTE, kv=ON_HOST)
    assert actions(policy.decide(Cause.RECONNECTED, woken, SYSTEM, 101.0)) == [Restore()]
    there = session(Phase.COMPUTE)
    assert not policy.decide(Cause.RECONNECTED, there, SYSTEM, 101.0).commands


def test_the_workers_own_eviction_between_generates_is_left_to_the_next_one(policy):
    taken = session(Phase.COMPUTE, kv=ON_HOST)
    assert not policy.decide(Cause.MOVED, taken, SYSTEM, 101.0).commands


# --- what is expected, and told ---


def test_what_was_told_is_told_again_once_it_has_passed(policy):
    overdue = session(Phase.IO_WAIT, kv=ON_HOST, forecast=UNIFORM, expected_wake_s=115.0)
    decision = policy.decide(Cause.REVIEW, overdue, SYSTEM, 115.0)
    (hint,) = actions(decision)
    assert isinstance(hint, SetHint)
    assert hint.expected_wake_s is not None
    assert hint.expected_wake_s > 117.0
    assert decision.review_at_s == hint.expected_wake_s


def test_however_long_one_stays_away_it_is_told_few_times(policy):
    now_s, told = 115.0, 0
    while now_s < 100.0 + 86_400.0:
        overdue = session(Phase.IO_WAIT, kv=ON_HOST, forecast=UNIFORM, expected_wake_s=now_s)
        decision = policy.decide(Cause.REVIEW, overdue, SYSTEM, now_s)
        assert decision.review_at_s is not None
        now_s = decision.review_at_s
        told += 1
    assert told < 60


def test_after_a_restart_there_is_only_the_time(policy):
    overdue = session(Phase.IO_WAIT, kv=ON_HOST, expected_wake_s=120.0)
    (hint,) = actions(policy.decide(Cause.REVIEW, overdue, SYSTEM, 121.0))
    assert isinstance(hint, SetHint)
    assert hint.expected_wake_s is not None
    assert hint.expected_wake_s > 122.0


def test_a_worker_that_evicted_one_by_itself_hears_that_nobody_expects_it(policy):
    taken = session(Phase.COMPUTE, kv=ON_HOST, last_active_s=110.0)
    early = policy.decide(Cause.MOVED, taken, SYSTEM, 111.0)
    assert not early.commands
    assert early.review_at_s == 110.0 + IDLE_S * SIGNALLED_IDLE_FACTOR
    decision = policy.decide(Cause.REVIEW, taken, SYSTEM, early.review_at_s)
    assert actions(decision) == [SetHint(expected_wake_s=None)]
    assert decision.review_at_s is None


def test_one_of_whom_nothing_is_known_is_looked_at_again_ever_later(policy):
    waiting = session(Phase.IO_WAIT)
    decision = policy.decide(Cause.SIGNAL, waiting, SYSTEM, 100.0)
    assert actions(decision) == [Evict()]
    assert decision.review_at_s == 100.0 + LEARN_DELAY_S
    away = replace(waiting, kv=ON_HOST)
    later = policy.decide(Cause.REVIEW, away, SYSTEM, 200.0)
    assert not later.commands
    assert later.review_at_s == 200.0 + 100.0 * LEARN_DELAY_SHARE
    known = policy.decide(Cause.REVIEW, replace(away, forecast=UNIFORM), SYSTEM, 105.0)
    assert actions(known) == [SetHint(expected_wake_s=UNIFORM.wake_s(0.5, 105.0))]


def test_without_order_nothing_is_told():
    policy = Semantic(PolicyOptions(order=False))
    waiting = session(Phase.IO_WAIT, forecast=UNIFORM, expected_wake_s=115.0)
    assert actions(policy.decide(Cause.SIGNAL, waiting, SYSTEM, 101.0)) == [Evict()]
    away = replace(waiting, kv=ON_HOST)
    assert not actions(policy.decide(Cause.REVIEW, away, SYSTEM, 116.0))


def test_without_refresh_it_is_told_once():
    policy = Semantic(PolicyOptions(refresh=False))
    waiting = session(Phase.IO_WAIT, forecast=UNIFORM, expected_wake_s=115.0)
    decision = policy.decide(Cause.SIGNAL, waiting, SYSTEM, 101.0)
    assert actions(decision) == [Evict(expected_wake_s=115.0)]
    assert decision.review_at_s is None
    away = replace(waiting, kv=ON_HOST)
    assert not actions(policy.decide(Cause.REVIEW, away, SYSTEM, 116.0))


def test_without_restore_a_wake_signal_is_left_to_the_generate():
    policy = Semantic(PolicyOptions(restore=False))
    woken = session(Phase.COMPUTE, kv=ON_HOST)
    assert not actions(policy.decide(Cause.SIGNAL, woken, SYSTEM, 100.0))


def test_without_idle_a_silent_session_is_left_alone():
    policy = Semantic(PolicyOptions(idle=False))
    assert policy.decide(Cause.GENERATE_FINISHED, session(), SYSTEM, 500.0) == NOTHING


def test_a_silent_session_is_told_by_how_long_such_are_silent(policy):
    silent = session(last_active_s=100.0, forecast=UNIFORM)
    (evict,) = actions(policy.decide(Cause.REVIEW, silent, SYSTEM, 100.0 + IDLE_S))
    assert evict == Evict(expected_wake_s=UNIFORM.wake_s(0.5, 100.0 + IDLE_S))


# --- prefetch ---


def test_one_that_may_have_lost_its_blocks_is_wanted_back_when_the_first_such_wake(policy):
    waiting = session(Phase.IO_WAIT, forecast=UNIFORM, expected_wake_s=115.0)
    decision = policy.decide(Cause.SIGNAL, waiting, FULL, 101.0)
    assert decision.review_at_s == pytest.approx(111.0 - 0.1, abs=0.01)
    away = replace(waiting, kv=CLEAN, evicted_s=101.0)
    assert not policy.decide(Cause.REVIEW, away, FULL, 110.0).wants_prefetch
    later = policy.decide(Cause.REVIEW, away, FULL, 111.0)
    assert later.wants_prefetch
    assert not later.commands
    assert later.review_at_s == 115.0


@pytest.mark.parametrize(
    ("fields", "worker"),
    [
        ({"evicted_s": 105.0}, {}),
        ({"prefetched": True}, {}),
        ({"forecast": None, "expected_wake_s": None}, {}),
        ({"kv": Residency(0, 0, 0, 64, resident=False)}, {}),
        ({}, {"full_s": None}),
    ],
)
def test_nobody_is_wanted_back_in_vain(policy, fields, worker):
    defaults = {
        "kv": CLEAN,
        "forecast": UNIFORM,
        "expected_wake_s": 115.0,
        "evicted_s": 101.0,
    }
    away = session(Phase.IO_WAIT, **(defaults | fields))
    system = SystemView({"w0": replace(WORKER, **worker)})
    assert not policy.decide(Cause.REVIEW, away, system, 112.0).wants_prefetch
    off = Semantic(PolicyOptions(prefetch=False))
    wanted = session(Phase.IO_WAIT, **defaults)
    assert policy.decide(Cause.REVIEW, wanted, FULL, 112.0).wants_prefetch
    assert not off.decide(Cause.REVIEW, wanted, FULL, 112.0).wants_prefetch


def test_one_that_was_fetched_in_vain_is_let_go_again(policy):
    there = session(
        Phase.IO_WAIT, prefetched=True, forecast=UNIFORM, expected_wake_s=115.0, kv=CLEAN_HERE
    )
    waits = policy.decide(Cause.REVIEW, there, FULL, 115.0)
    assert not waits.commands
    assert waits.review_at_s == pytest.approx(119.5, abs=0.01)
    (evict,) = actions(policy.decide(Cause.REVIEW, there, FULL, waits.review_at_s))
    assert isinstance(evict, Evict)
    assert evict.expected_wake_s is not None
    assert evict.expected_wake_s > 119.5


def test_a_decision_to_evict_is_explained(policy):
    waiting = session(Phase.IO_WAIT, forecast=UNIFORM, expected_wake_s=115.0)
    explanation = policy.decide(Cause.SIGNAL, waiting, FULL, 101.0).explanation
    assert explanation is not None
    assert explanation == policy.explain(waiting, FULL, 101.0)
    told = explanation.attributes()
    assert told["djinn.wait.source"] == "tool"
    assert told["djinn.wait.waited_seconds"] == 1.0
    assert told["djinn.decision.best"] in {"keep", "evict", "drop"}


@given(
    cause=st.sampled_from(Cause),
    phase=st.sampled_from(list(Phase)[:3]),
    generating=st.booleans(),
    connected=st.booleans(),
    prefetched=st.booleans(),
    forecast=st.sampled_from([None, UNIFORM]),
    moving=st.sampled_from(["", "evict", "restore", "prefetch", "drop"]),
    kv=st.sampled_from([RESIDENT, ON_HOST, NO_KV]),
    failures=st.integers(0, 10),
    now_s=st.floats(100.0, 200.0),
)
def test_it_is_a_function_of_what_it_sees(
    cause, phase, generating, connected, prefetched, forecast, moving, kv, failures, now_s
):
    policy = Semantic(PolicyOptions(idle_threshold_s=IDLE_S))
    seen = session(
        phase,
        generating=generating,
        connected=connected,
        moving=moving,
        kv=kv,
        failures=failures,
        prefetched=prefetched,
        forecast=forecast,
        evicted_s=None if prefetched else 100.0,
        last_active_s=now_s if cause is Cause.SIGNAL else 100.0,
    )
    decision = policy.decide(cause, seen, FULL, now_s)
    assert decision == policy.decide(cause, seen, FULL, now_s)
    if decision.review_at_s is not None:
        assert decision.review_at_s > now_s
    if phase is Phase.IO_WAIT:
        assert Restore() not in actions(decision)
    for command in decision.commands:
        assert connected
        assert not generating
        assert command.session_id == "a"
