from __future__ import annotations

import random

import pytest

from services.scheduler.forecast import SHARES, Source, WakeForecast
from services.scheduler.prediction_quality import PredictionQuality

UNIFORM = WakeForecast(0.0, 1.0, tuple(10 + 10 * share for share in SHARES), Source.TOOL)
TOO_SHORT = WakeForecast(0.0, 0.1, UNIFORM.shape, Source.HINT)


@pytest.fixture
def quality() -> PredictionQuality:
    rng = random.Random(2)
    made = PredictionQuality()
    for _ in range(2000):
        duration_s = rng.uniform(10, 20)
        made.observe(UNIFORM, duration_s)
        made.observe(TOO_SHORT, duration_s)
    return made


def test_a_true_forecast_covers_what_it_says_and_errs_as_little_as_can_be(quality):
    found = quality.by_source()[Source.TOOL]
    assert found.wakes == 2000
    assert found.coverage == pytest.approx(0.8, abs=0.1)
    assert found.median_error_s == pytest.approx(2.5, abs=0.7)
    # Of a uniform distribution of width 10, at its true deciles: 10 * q * (1 - q) / 2 each.
    assert found.pinball_s == pytest.approx((0.45 + 1.25 + 0.45) / 3, abs=0.15)


def test_a_wrong_one_shows_in_each_measure(quality):
    right, wrong = quality.by_source()[Source.TOOL], quality.by_source()[Source.HINT]
    assert wrong.coverage == pytest.approx(0.0, abs=1e-6)
    assert wrong.median_error_s > 4 * right.median_error_s
    assert wrong.pinball_s > 4 * right.pinball_s


def test_what_was_not_predicted_is_counted(quality):
    quality.observe(None, 3.0)
    assert quality.unpredicted == 1
