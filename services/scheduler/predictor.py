"""How long tool calls take, learnt as they end.

Each tool has a histogram of durations in buckets that widen by a constant factor, so that minutes
and milliseconds are told with the same relative accuracy and a few very long calls do not move the
median. Old calls fade: each new one scales the weight of those before it. Where clients give
estimates, a second histogram learns how far off they are, and the next estimate is corrected by
it. A tool not seen often enough is taken for the average one.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate

from services.scheduler.session import Waited


class Source(Enum):
    """What a prediction rests on."""

    HINT = "hint"
    TOOL = "tool"
    POPULATION = "population"


@dataclass(frozen=True, slots=True)
class Prediction:
    """How long a tool call will take, in seconds.

    Attributes:
        early_s: One in ten is over by then.
        median_s: Half are.
    """

    early_s: float
    median_s: float
    source: Source


class DecayingHistogram:
    """Quantiles of positive numbers, of which older ones count less.

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

        Raises:
            ValueError: Nothing was added yet.
        """
        if not self._weight:
            raise ValueError("no observations")
        reached = list(accumulate(self._counts))
        # Sums in another order than `_weight` was: a share of all must not lie beyond the last.
        whole = reached[-1] * (1 - 1e-9)
        return tuple(
            self._low * math.exp(bisect_left(reached, share * whole) * self._log_growth)
            for share in shares
        )


@dataclass(slots=True)
class _Tool:
    durations: DecayingHistogram
    # Of actual over expected duration, for calls whose client gave an estimate.
    ratios: DecayingHistogram


def _new_tool() -> _Tool:
    return _Tool(DecayingHistogram(), DecayingHistogram(low=0.001, high=1000.0, growth=1.1))


class Predictor:
    """Learns from tool calls that have ended and predicts those that begin.

    Args:
        most_tools: Tools remembered; the one longest unused is forgotten for a new one.
        enough: Weight of observations from which a tool's own numbers are trusted.
    """

    def __init__(self, most_tools: int = 1024, enough: float = 2.5) -> None:
        self._tools: OrderedDict[str, _Tool] = OrderedDict()
        self._all = _new_tool()
        self._most_tools = most_tools
        self._enough = enough

    def learn(self, waited: Waited) -> None:
        """Takes in a tool call that has ended."""
        kinds = [self._all]
        if waited.tool_name:
            kinds.append(self._tool(waited.tool_name))
        for kind in kinds:
            kind.durations.add(waited.duration_s)
            if waited.expected_s:
                kind.ratios.add(max(waited.duration_s, 1e-3) / waited.expected_s)

    def predict(self, tool_name: str, expected_s: float | None) -> Prediction | None:
        """Returns how long a tool call that begins will take.

        Args:
            tool_name: Empty: unnamed.
            expected_s: The client's estimate, if it gave one.

        Returns:
            None if nothing at all is known.
        """
        tool = self._tools.get(tool_name) if tool_name else None
        if tool is not None:
            self._tools.move_to_end(tool_name)
        if expected_s is not None:
            return self._from_hint(tool, expected_s)
        if tool is not None and tool.durations.weight >= self._enough:
            return _prediction(tool.durations, Source.TOOL)
        if self._all.durations.weight >= self._enough:
            return _prediction(self._all.durations, Source.POPULATION)
        return None

    def _from_hint(self, tool: _Tool | None, expected_s: float) -> Prediction:
        known = tool is not None and tool.ratios.weight >= self._enough
        ratios = tool.ratios if tool is not None and known else self._all.ratios
        if ratios.weight < self._enough:
            return Prediction(expected_s, expected_s, Source.HINT)
        return _prediction(ratios, Source.HINT, expected_s)

    def _tool(self, name: str) -> _Tool:
        tool = self._tools.get(name)
        if tool is None:
            if len(self._tools) >= self._most_tools:
                self._tools.popitem(last=False)
            tool = self._tools[name] = _new_tool()
        self._tools.move_to_end(name)
        return tool


def _prediction(seen: DecayingHistogram, source: Source, unit_s: float = 1.0) -> Prediction:
    early, median = seen.quantiles(0.1, 0.5)
    return Prediction(early * unit_s, median * unit_s, source)
