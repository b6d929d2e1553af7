"""When a step is launched behind another, in virtual time."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.worker.engine.step_clock import StepClock, StepSize

LEAD_S = 0.001
DECODES = StepSize(decodes=4, prompt_tokens=0, kv_tokens=4000)
PROMPT = StepSize(decodes=4, prompt_tokens=256, kv_tokens=5000)


def run(clock: StepClock, size: StepSize, start_s: float, busy_s: float) -> None:
    """One step alone, launched in no time."""
    clock.launched(size, start_s, start_s)
    clock.ended(busy_s, start_s + busy_s)


def due_behind(clock: StepClock, size: StepSize, start_s: float) -> float:
    """When a step may be launched behind one that starts now."""
    clock.launched(size, start_s, start_s)
    due_s = clock.due_s(DECODES)
    assert due_s is not None
    return due_s


def test_with_no_step_in_flight_one_is_launched_at_once() -> None:
    clock = StepClock(LEAD_S)
    assert clock.due_s(DECODES) == -math.inf
    run(clock, DECODES, 0.0, 0.010)
    assert clock.due_s(DECODES) == -math.inf


def test_a_step_like_none_before_is_waited_for() -> None:
    clock = StepClock(LEAD_S)
    run(clock, DECODES, 0.0, 0.010)
    clock.launched(PROMPT, 1.0, 1.0)
    assert clock.due_s(DECODES) is None


def test_the_next_is_due_a_lead_before_the_end() -> None:
    clock = StepClock(LEAD_S)
    run(clock, DECODES, 0.0, 0.010)
    assert due_behind(clock, DECODES, 5.0) == pytest.approx(5.009)


def test_a_step_behind_another_starts_when_that_ends() -> None:
    clock = StepClock(LEAD_S)
    run(clock, DECODES, 0.0, 0.010)
    clock.launched(DECODES, 5.0, 5.0)
    clock.launched(DECODES, 5.009, 5.0095)
    assert clock.due_s(DECODES) is None
    clock.ended(0.011, 5.011)
    assert clock.due_s(DECODES) == pytest.approx(5.011 + 0.0102 - LEAD_S)


def test_what_takes_long_to_launch_is_not_launched_while_tokens_may_come() -> None:
    clock = StepClock(LEAD_S)
    run(clock, DECODES, 0.0, 0.010)
    clock.launched(PROMPT, 1.0, 1.008)
    clock.ended(0.020, 1.020)
    clock.launched(DECODES, 2.0, 2.0)
    assert clock.due_s(PROMPT) is None
    assert clock.due_s(DECODES) is not None


def test_the_device_begins_while_a_long_launch_goes_on() -> None:
    clock = StepClock(LEAD_S)
    run(clock, PROMPT, 0.0, 0.020)
    clock.launched(PROMPT, 1.0, 1.008)
    assert clock.due_s(DECODES) == pytest.approx(1.0 + LEAD_S + 0.020 - LEAD_S)


def test_longer_contexts_take_longer() -> None:
    clock = StepClock(LEAD_S)
    for number in range(60):
        kv_tokens = 20_000 if number % 2 else 60_000
        size = StepSize(32, 0, kv_tokens)
        run(clock, size, float(number), 0.005 + 1e-7 * kv_tokens)
    due_s = due_behind(clock, StepSize(32, 0, 100_000), 100.0)
    assert due_s == pytest.approx(100.015 - LEAD_S, rel=1e-5)


def test_a_step_may_wait_on_the_device_for_no_longer_than_the_lead() -> None:
    clock = StepClock(LEAD_S)
    assert clock.is_soon(LEAD_S / 2)
    assert not clock.is_soon(2 * LEAD_S)


def test_a_jitter_of_steps_alike_is_not_taken_for_a_slope() -> None:
    clock = StepClock(LEAD_S)
    for number in range(60):
        size = StepSize(32, 0, 35_000 + 32 * (number % 8))
        run(clock, size, float(number), 0.009 + 2e-5 * (number % 2))
    due_s = due_behind(clock, StepSize(32, 0, 45_000), 100.0)
    assert due_s == pytest.approx(100.009 - LEAD_S, abs=5e-4)


@given(st.integers(1, 4096), st.integers(1, 4096))
def test_kinds_keep_the_order_of_sizes(one: int, other: int) -> None:
    small, large = sorted((one, other))
    kinds = [StepSize(count, 0, 0).kind[0] for count in (small, large)]
    assert kinds == sorted(kinds)
    assert large <= kinds[1] <= max(1.5 * large, large + 1)
