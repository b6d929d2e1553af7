from __future__ import annotations

import random

import pytest

from services.scheduler.forecast import Source
from services.scheduler.pace import Pace
from services.scheduler.predictor import Predictor
from services.scheduler.session import Waited


def taught(*calls: Waited) -> Predictor:
    predictor = Predictor()
    for call in calls:
        predictor.learn(call)
    return predictor


def test_nothing_is_known_at_first():
    assert Predictor().predict("search", None) is None


def test_a_hint_is_believed_until_it_is_known_better():
    prediction = Predictor().predict("search", 12.0)
    assert prediction is not None
    assert prediction.median_s == pytest.approx(12.0)
    assert prediction.source is Source.HINT
    assert 0 < prediction.quantile_s(0.1) < 12.0 < prediction.quantile_s(0.9)


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


def test_a_tool_is_believed_rather_than_estimates_that_say_nothing():
    rng = random.Random(3)
    predictor = Predictor()
    for _ in range(60):
        predictor.learn(Waited("build", rng.choice([1.0, 10.0, 100.0, 1000.0]), 20.0))
    prediction = predictor.predict("build", 1000.0)
    assert prediction is not None
    assert prediction.source is Source.TOOL
    assert prediction.median_s == pytest.approx(20.0, rel=0.1)


def test_an_agent_that_is_slower_than_others_is_known_by_its_own_pace():
    rng = random.Random(5)
    predictor = Predictor()
    paces = {factor: Pace() for factor in (0.2, 1.0, 5.0)}
    for _ in range(40):
        for factor, pace in paces.items():
            forecast = predictor.predict("search", None, 0.0, pace)
            waited = Waited("search", None, 10.0 * factor * rng.uniform(0.9, 1.1))
            predictor.learn(waited, forecast, pace)
    medians = {}
    for factor, pace in paces.items():
        prediction = predictor.predict("search", None, 0.0, pace)
        assert prediction is not None
        medians[factor] = prediction.median_s
    assert medians[0.2] < 4.0
    assert medians[5.0] > 30.0
    assert 5.0 < medians[1.0] < 20.0


def test_paces_that_are_only_noise_are_left_alone():
    rng = random.Random(6)
    predictor = Predictor()
    paces = [Pace() for _ in range(10)]
    for _ in range(30):
        for pace in paces:
            forecast = predictor.predict("search", None, 0.0, pace)
            predictor.learn(Waited("search", None, rng.uniform(10, 20)), forecast, pace)
    for pace in paces:
        prediction = predictor.predict("search", None, 0.0, pace)
        assert prediction is not None
        assert prediction.pace == 1.0


def test_silence_is_learnt_apart_from_tools():
    predictor = Predictor()
    assert predictor.predict_silence(0.0) is None
    for _ in range(5):
        predictor.learn_silence(4.0)
    silence = predictor.predict_silence(100.0)
    assert silence is not None
    assert silence.source is Source.SILENCE
    assert silence.wake_s(0.5, 100.0) == pytest.approx(104.0, rel=0.01)
    assert predictor.predict("search", None) is None


def test_a_forecast_counts_from_when_the_call_began():
    predictor = taught(*[Waited("search", None, 5.0)] * 5)
    prediction = predictor.predict("search", None, 1000.0)
    assert prediction is not None
    assert prediction.wake_s(0.5, 1000.0) == pytest.approx(1005.0, abs=0.5)
