"""How long each stage of the start took, by what it reports of itself."""

from __future__ import annotations

import time
from collections.abc import Callable

Report = Callable[[str, float], None]


class StageTimes:
    """Passes reports on and notes when a new stage begins.

    Args:
        report: Told what is being done and the fraction done.
        clock: Seconds, from anywhere.
    """

    def __init__(self, report: Report, clock: Callable[[], float] = time.monotonic) -> None:
        self._report = report
        self._clock = clock
        self._stage = ""
        self._began_s = clock()
        self._seconds: dict[str, float] = {}

    def __call__(self, stage: str, done: float) -> None:
        """Reports a stage; one of another name ends the last one."""
        self._take()
        self._stage = stage
        self._report(stage, done)

    def summary(self) -> str:
        """Returns all stages so far with their seconds, in order, after their sum."""
        self._take()
        stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in self._seconds.items())
        return f"{sum(self._seconds.values()):.1f} s: {stages}"

    def _take(self) -> None:
        now_s = self._clock()
        if self._stage:
            past_s = self._seconds.get(self._stage, 0.0)
            self._seconds[self._stage] = past_s + now_s - self._began_s
        self._began_s = now_s
