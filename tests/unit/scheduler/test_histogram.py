from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.scheduler.histogram import DecayingHistogram


@given(st.lists(st.floats(0.02, 50_000), min_size=1, max_size=200))
def test_quantiles_ascend_within_what_was_seen(values):
    histogram = DecayingHistogram()
    for value in values:
        histogram.add(value)
    early, median, late = histogram.quantiles(0.1, 0.5, 0.9)
    assert early <= median <= late
    assert min(values) / 1.16 <= early
    assert late <= max(values) * 1.16


def test_quantiles_are_near_the_true_ones():
    rng = random.Random(7)
    values = [rng.lognormvariate(1.0, 1.0) for _ in range(2000)]
    histogram = DecayingHistogram(decay=1.0)
    for value in values:
        histogram.add(value)
    values.sort()
    for share in (0.1, 0.5, 0.9):
        (found,) = histogram.quantiles(share)
        assert found == pytest.approx(values[int(share * len(values))], rel=0.05)


def test_the_weight_is_bounded_and_survives_very_many_observations():
    histogram = DecayingHistogram(decay=0.9)
    for _ in range(5000):
        histogram.add(3.0)
    assert histogram.weight == pytest.approx(10.0, rel=1e-6)
    assert histogram.quantiles(0.5)[0] == pytest.approx(3.0, rel=0.1)


def test_no_observations_have_no_quantiles():
    with pytest.raises(ValueError, match="no observations"):
        DecayingHistogram().quantiles(0.5)
