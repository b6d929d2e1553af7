from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.scheduler.forecast import SHARES, Source, WakeForecast, from_hint

T0 = 1000.0


def forecast(*durations: float) -> WakeForecast:
    ordered = sorted(durations)
    shape = tuple(ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in SHARES)
    return WakeForecast(T0, 1.0, shape, Source.TOOL)


@pytest.fixture
def uniform() -> WakeForecast:
    return forecast(*(10 + 10 * i / 1000 for i in range(1000)))


def test_without_waiting_it_is_the_distribution_itself(uniform):
    assert uniform.wake_s(0.5, T0) == pytest.approx(T0 + 15.0, abs=0.1)
    assert uniform.quantile_s(0.1) == pytest.approx(11.0, abs=0.1)
    assert uniform.remaining_s(T0) == pytest.approx(15.0, abs=0.2)


def test_who_has_not_woken_yet_wakes_later(uniform):
    assert uniform.wake_s(0.5, T0 + 16.0) == pytest.approx(T0 + 18.0, abs=0.1)
    assert uniform.remaining_s(T0 + 16.0) == pytest.approx(2.0, abs=0.2)


def test_a_short_tool_that_drags_on_is_taken_for_a_long_one():
    mixed = forecast(*[1.0 + i / 1000 for i in range(800)], *[100.0 + i for i in range(200)])
    assert mixed.wake_s(0.5, T0) < T0 + 2.0
    assert mixed.wake_s(0.5, T0 + 5.0) > T0 + 100.0


def test_beyond_all_experience_it_is_expected_in_proportion_to_the_wait():
    heavy = forecast(*(math.exp(random.Random(1).gauss(0, 2)) for _ in range(3)), 1.0, 10.0, 100.0)
    for waited_s in (1e3, 1e4, 1e5):
        more_s = heavy.remaining_s(T0 + waited_s)
        assert 0.1 * waited_s < more_s < 10 * waited_s


def test_a_constant_duration_is_one():
    constant = forecast(*[7.0] * 100)
    assert constant.wake_s(0.1, T0) == constant.wake_s(0.9, T0) == T0 + 7.0
    assert constant.wake_s(0.5, T0 + 8.0) > T0 + 8.0


def test_an_estimate_alone_is_a_median():
    hint = from_hint(T0, 8.0)
    assert hint.median_s == pytest.approx(8.0)
    assert hint.quantile_s(0.1) == pytest.approx(4.0)
    assert hint.quantile_s(0.9) == pytest.approx(16.0)


@given(
    st.lists(st.floats(0.01, 1e5), min_size=1, max_size=60),
    st.floats(0, 1e6),
    st.floats(0.01, 0.98),
    st.floats(0, 1e5),
)
def test_forecasts_are_never_of_the_past_and_ascend(durations, waited_s, share, later_s):
    made = forecast(*durations)
    now_s = T0 + waited_s
    wake_s = made.wake_s(share, now_s)
    assert math.isfinite(wake_s)
    assert wake_s >= now_s - 1e-6 * now_s
    assert made.wake_s(share + 0.01, now_s) >= wake_s - 1e-6 * wake_s
    # Who has waited longer wakes no earlier.
    assert made.wake_s(share, now_s + later_s) >= wake_s - 1e-6 * wake_s
    assert made.remaining_s(now_s) >= 0
