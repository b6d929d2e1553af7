from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.scheduler.predictor import DecayingHistogram, Predictor, Source
from services.scheduler.session import Waited


def taught(*calls: Waited) -> Predictor:
    predictor = Predictor()
    for call in calls:
        predictor.learn(call)
    return predictor


@given(st.lists(st.floats(0.02, 50_000), min_size=1, max_size=200))
def test_quantiles_ascend_within_what_was_seen(values):
    histogram = DecayingHistogram()
    for value in values:
        histogram.add(value)
    early, median, late = histogram.quantiles(0.1, 0.5, 0.9)
    assert early <= median <= late
    assert min(values) / 1.16 <= early
    assert late <= max(values) * 1.16


def test_quantiles_are_within_a_bucket_of_the_true_ones():
    rng = random.Random(7)
    values = [rng.lognormvariate(1.0, 1.0) for _ in range(2000)]
    histogram = DecayingHistogram(decay=1.0)
    for value in values:
        histogram.add(value)
    values.sort()
    for share in (0.1, 0.5, 0.9):
        (found,) = histogram.quantiles(share)
        assert found == pytest.approx(values[int(share * len(values))], rel=0.1)


def test_the_weight_is_bounded_and_survives_very_many_observations():
    histogram = DecayingHistogram(decay=0.9)
    for _ in range(5000):
        histogram.add(3.0)
    assert histogram.weight == pytest.approx(10.0, rel=1e-6)
    assert histogram.quantiles(0.5)[0] == pytest.approx(3.0, rel=0.1)


def test_no_observations_have_no_quantiles():
    with pytest.raises(ValueError, match="no observations"):
        DecayingHistogram().quantiles(0.5)


def test_nothing_is_known_at_first():
    assert Predictor().predict("search", None) is None


def test_a_hint_is_believed_until_it_is_known_better():
    prediction = Predictor().predict("search", 12.0)
    assert prediction is not None
    assert (prediction.median_s, prediction.source) == (12.0, Source.HINT)


def test_a_hint_is_corrected_by_how_far_off_hints_were():
    predictor = taught(*[Waited("search", 10.0, 30.0)] * 5)
    prediction = predictor.predict("search", 20.0)
    assert prediction is not None
    assert prediction.median_s == pytest.approx(60.0, rel=0.1)
    unknown_tool = predictor.predict("shell", 2.0)
    assert unknown_tool is not None
    assert unknown_tool.median_s == pytest.approx(6.0, rel=0.1)


def test_a_tool_is_known_by_its_name():
    calls = [Waited("search", None, 2.0), Waited("build", None, 300.0)] * 5
    predictor = taught(*calls)
    search = predictor.predict("search", None)
    build = predictor.predict("build", None)
    assert search is not None
    assert build is not None
    assert search.source is build.source is Source.TOOL
    assert search.median_s == pytest.approx(2.0, rel=0.1)
    assert build.median_s == pytest.approx(300.0, rel=0.1)


def test_an_unknown_or_unnamed_tool_is_taken_for_the_average():
    predictor = taught(*[Waited("search", None, 5.0)] * 5, Waited("rare", None, 100.0))
    for name in ("", "new", "rare"):
        prediction = predictor.predict(name, None)
        assert prediction is not None
        assert prediction.source is Source.POPULATION
        assert prediction.median_s == pytest.approx(5.0, rel=0.1)


def test_a_few_very_long_calls_do_not_move_the_median():
    predictor = taught(*[Waited("search", None, 5.0)] * 40, *[Waited("search", None, 5000.0)] * 4)
    prediction = predictor.predict("search", None)
    assert prediction is not None
    assert prediction.median_s == pytest.approx(5.0, rel=0.1)


def test_what_was_learnt_fades():
    predictor = taught(*[Waited("search", None, 5.0)] * 100, *[Waited("search", None, 50.0)] * 60)
    prediction = predictor.predict("search", None)
    assert prediction is not None
    assert prediction.median_s == pytest.approx(50.0, rel=0.1)


def test_the_tool_longest_unused_is_forgotten():
    predictor = Predictor(most_tools=2)
    for _ in range(5):
        predictor.learn(Waited("old", None, 1.0))
        predictor.learn(Waited("kept", None, 2.0))
    predictor.predict("old", None)
    predictor.learn(Waited("new", None, 3.0))
    kept = predictor.predict("kept", None)
    old = predictor.predict("old", None)
    assert old is not None
    assert old.source is Source.TOOL
    assert kept is not None
    assert kept.source is Source.POPULATION


@pytest.mark.parametrize("duration_s", [0.0, 1e-9, 1e9])
def test_extreme_durations_are_taken(duration_s):
    predictor = taught(*[Waited("search", 1.0, duration_s)] * 4)
    prediction = predictor.predict("search", None)
    assert prediction is not None
    assert 0 < prediction.median_s <= 100_000
