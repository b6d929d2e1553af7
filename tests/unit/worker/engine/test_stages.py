"""The seconds of each stage of the start."""

from __future__ import annotations

from services.worker.engine.stages import StageTimes


def test_each_stage_has_the_time_until_the_next_one() -> None:
    heard: list[tuple[str, float]] = []
    times = iter([0.0, 1.0, 3.0, 3.5, 10.0, 11.0])
    stages = StageTimes(lambda stage, done: heard.append((stage, done)), lambda: next(times))
    for report in (("weights", 0.0), ("weights", 0.5), ("pools", 0.0), ("weights", 1.0)):
        stages(*report)
    assert stages.summary() == "10.0 s: weights 3.5, pools 6.5"
    assert heard == [("weights", 0.0), ("weights", 0.5), ("pools", 0.0), ("weights", 1.0)]
