"""When a session is expected to wake, as a distribution that changes as it does not.

A tool call that has run for long is not the one that began: those that are usually short have
dropped out. So a forecast is kept as a whole distribution, and every question to it is asked on
condition that the session has not woken until now.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from enum import Enum
from typing import Final


class Source(Enum):
    """What a forecast rests on."""

    HINT = "hint"
    TOOL = "tool"
    POPULATION = "population"
    SILENCE = "silence"


SHARES: Final = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
"""The shares of sessions for which a forecast's `shape` has the time by which they have woken."""

_LAST: Final = 1.0 - SHARES[-1]
_NINETY: Final = SHARES.index(0.9)
# Five points of equal weight stand for the mean: of a heavy tail it may not exist.
_MEAN_POINTS: Final = (0.1, 0.3, 0.5, 0.7, 0.9)

HINT_SHAPE: Final = (
    0.284,
    0.411,
    0.5,
    0.634,
    0.753,
    0.872,
    1.0,
    1.147,
    1.328,
    1.576,
    2.0,
    2.434,
    3.519,
)
"""What is made of an estimate that nothing is known of: it is the median of a log-normal of which
four in five lie between half and twice it."""


@dataclass(frozen=True, slots=True)
class WakeForecast:
    """The distribution of when a session wakes.

    Between the points of `shape` the distribution is linear. Beyond the last it falls as a power of
    time (Pareto), as steeply as between its ninth decile and its last point, within limits: who
    waits longer than nearly everybody before is expected to wait as long again, roughly, which is
    the best guess about heavy tails (Harchol-Balter and Downey, "Exploiting process lifetime
    distributions for dynamic load balancing", 1997).

    Attributes:
        since_s: When the wait began.
        unit_s: What `shape` is in multiples of, in seconds.
        shape: The durations by which the `SHARES` are over; ascending, shared between forecasts.
        source: What it rests on.
        pace: The factor in `unit_s` by which this agent's calls differ from others'.
    """

    since_s: float
    unit_s: float
    shape: tuple[float, ...]
    source: Source
    pace: float = 1.0

    @property
    def median_s(self) -> float:
        """The median duration, in seconds from the wait's beginning."""
        return self.quantile_s(0.5)

    def quantile_s(self, share: float) -> float:
        """Returns the duration by which a share of such waits is over, whatever has passed."""
        return self.unit_s * self._duration(1.0 - share)

    def wake_s(self, share: float, now_s: float) -> float:
        """Returns by when a share of those that still wait at `now_s` will have woken."""
        waited_s = max(0.0, now_s - self.since_s)
        alive = self._survival(waited_s / self.unit_s)
        duration_s = self.unit_s * self._duration(alive * (1.0 - share))
        return self.since_s + max(duration_s, waited_s)

    def remaining_s(self, now_s: float) -> float:
        """Returns for how much longer one that still waits at `now_s` will wait on average."""
        total = sum(self.wake_s(share, now_s) for share in _MEAN_POINTS)
        return max(0.0, total / len(_MEAN_POINTS) - now_s)

    def _survival(self, waited: float) -> float:
        """Returns which share waits for longer than this many units; never 0."""
        shape = self.shape
        if waited >= shape[-1]:
            return float(_LAST * (waited / shape[-1]) ** -self._tail())
        index = bisect_left(shape, waited)
        if index == 0:
            return 1.0 - SHARES[0] * waited / shape[0]
        low, high = shape[index - 1], shape[index]
        within = (waited - low) / (high - low)
        return 1.0 - (SHARES[index - 1] + within * (SHARES[index] - SHARES[index - 1]))

    def _duration(self, alive: float) -> float:
        """Returns after how many units only this share, above 0, still waits."""
        shape = self.shape
        if alive <= _LAST:
            return float(shape[-1] * (_LAST / alive) ** (1.0 / self._tail()))
        share = 1.0 - alive
        index = bisect_left(SHARES, share)
        if index == 0:
            return shape[0] * share / SHARES[0]
        within = (share - SHARES[index - 1]) / (SHARES[index] - SHARES[index - 1])
        return shape[index - 1] + within * (shape[index] - shape[index - 1])

    def _tail(self) -> float:
        """Returns the exponent of the power by which the tail falls."""
        steepness = math.log(self.shape[-1] / self.shape[_NINETY])
        if steepness <= 0:
            return 1.0
        return min(1.0, max(0.5, math.log((1.0 - 0.9) / _LAST) / steepness))


def from_hint(since_s: float, expected_s: float) -> WakeForecast:
    """Returns the forecast of a wait of which only somebody's estimate is known.

    Args:
        since_s: When the wait began.
        expected_s: The estimate; above 0.
    """
    return WakeForecast(since_s, expected_s, HINT_SHAPE, Source.HINT)
