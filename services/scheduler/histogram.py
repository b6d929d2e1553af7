"""Quantiles of a stream of numbers, of which older ones count less."""

from __future__ import annotations

import math
from bisect import bisect_left
from itertools import accumulate


class DecayingHistogram:
    """Quantiles of positive numbers, of which older ones count less.

    Buckets widen by a constant factor, so that minutes and milliseconds are told with the same
    relative accuracy and a few very large numbers do not move the median.

    Args:
        low: Everything smaller counts as this.
        high: Everything larger counts as this.
        growth: Each bucket is this much wider than the one before: the relative error.
        decay: What an observation's weight is multiplied by with each later one.
    """

    __slots__ = ("_counts", "_decay", "_log_growth", "_low", "_unit", "_weight")

    def __init__(
        self, low: float = 0.01, high: float = 86_400.0, growth: float = 1.15, decay: float = 0.98
    ) -> None:
        self._low = low
        self._log_growth = math.log(growth)
        buckets = math.ceil(math.log(high / low) / self._log_growth) + 1
        self._counts = [0.0] * buckets
        self._decay = decay
        # The newest observation's weight: growing it is the same as shrinking all the others.
        self._unit = 1.0
        self._weight = 0.0

    @property
    def weight(self) -> float:
        """How many observations of full weight it holds; at most 1 / (1 - decay)."""
        return self._weight / self._unit

    def add(self, value: float, count: float = 1.0) -> None:
        """Counts a value in, `count` times."""
        self._unit /= self._decay
        if self._unit > 1e12:
            self._counts = [kept / self._unit for kept in self._counts]
            self._weight /= self._unit
            self._unit = 1.0
        position = math.log(max(value, self._low) / self._low) / self._log_growth
        bucket = min(len(self._counts) - 1, round(position))
        self._counts[bucket] += self._unit * count
        self._weight += self._unit * count

    def quantiles(self, *shares: float) -> tuple[float, ...]:
        """Returns the values below which the given shares, above 0 and up to 1, lie.

        Within a bucket the numbers are taken to be spread evenly on a logarithmic scale.

        Raises:
            ValueError: Nothing was added yet.
        """
        if not self._weight:
            raise ValueError("no observations")
        reached = list(accumulate(self._counts))
        # Sums in another order than `_weight` was: a share of all must not lie beyond the last.
        whole = reached[-1] * (1 - 1e-9)
        return tuple(self._value_at(reached, share * whole) for share in shares)

    def _value_at(self, reached: list[float], target: float) -> float:
        bucket = bisect_left(reached, target)
        below = reached[bucket - 1] if bucket else 0.0
        within = (target - below) / (reached[bucket] - below)
        return self._low * math.exp((bucket + within - 0.5) * self._log_growth)
