"""How long tool calls take, learnt as they end.

Each tool has a histogram of its durations, in which old calls fade. Where clients give estimates, a
second histogram learns how far off they are, and the next estimate is corrected by it. Both are
scored on every call that ends, and the one that has been nearer lately is asked. A tool not seen
often enough is taken for the average one.

Each agent has a pace, the factor by which its calls take longer than those of others. It counts
where it has made predictions better.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, field

from services.scheduler.forecast import SHARES, Source, WakeForecast, from_hint
from services.scheduler.histogram import DecayingHistogram
from services.scheduler.pace import Pace
from services.scheduler.prediction_quality import PredictionQuality
from services.scheduler.session import Waited

_ERROR_DECAY = 0.95
# By how much, as a factor, another source must have been nearer to be asked instead of the first.
_CLEARLY = 0.9


@dataclass(slots=True)
class _Error:
    """A mean of how far off predictions were, as factors, older ones counting less."""

    weight: float = 0.0
    total: float = 0.0

    @property
    def mean(self) -> float:
        return self.total / self.weight if self.weight else math.inf

    def add(self, log_ratio: float) -> None:
        self.weight = self.weight * _ERROR_DECAY + 1.0
        self.total = self.total * _ERROR_DECAY + abs(log_ratio)


@dataclass(slots=True)
class _Tool:
    durations: DecayingHistogram = field(default_factory=DecayingHistogram)
    # Of actual over expected duration, for calls whose client gave an estimate.
    ratios: DecayingHistogram = field(
        default_factory=lambda: DecayingHistogram(low=0.001, high=1000.0, growth=1.1)
    )
    hint_error: _Error = field(default_factory=_Error)
    own_error: _Error = field(default_factory=_Error)
    paced_error: _Error = field(default_factory=_Error)
    plain_error: _Error = field(default_factory=_Error)


class Predictor:
    """Learns from tool calls that have ended and predicts those that begin.

    Args:
        most_tools: Tools remembered; the one longest unused is forgotten for a new one.
        enough: Weight of observations from which a tool's own numbers are trusted.

    Attributes:
        quality: How good the predictions have been.
    """

    def __init__(self, most_tools: int = 1024, enough: float = 2.5) -> None:
        self.quality = PredictionQuality()
        self._tools: OrderedDict[str, _Tool] = OrderedDict()
        self._all = _Tool()
        self._silence = DecayingHistogram()
        self._most_tools = most_tools
        self._enough = enough

    def learn(
        self, waited: Waited, forecast: WakeForecast | None = None, pace: Pace | None = None
    ) -> None:
        """Takes in a tool call that has ended.

        Args:
            waited: The call.
            forecast: What was predicted of it; None: nothing.
            pace: Its agent's, which learns from it too; None: nothing is known of the agent.
        """
        duration_s = max(waited.duration_s, 1e-3)
        self.quality.observe(forecast, duration_s)
        kinds = [self._all]
        if waited.tool_name:
            tool = self._tool(waited.tool_name)
            self._score(tool, waited.expected_s, duration_s)
            kinds.append(tool)
        if forecast is not None:
            self._learn_pace(kinds[-1], forecast, pace, duration_s)
        for kind in kinds:
            kind.durations.add(duration_s)
            if waited.expected_s:
                kind.ratios.add(duration_s / waited.expected_s)

    def learn_silence(self, duration_s: float, forecast: WakeForecast | None = None) -> None:
        """Takes in for how long a session whose client signals nothing did nothing.

        Args:
            duration_s: From the end of one Generate to the next one's start.
            forecast: What was predicted of it; None: nothing.
        """
        if forecast is not None:
            self.quality.observe(forecast, max(duration_s, 1e-3))
        self._silence.add(max(duration_s, 1e-3))

    def predict(
        self,
        tool_name: str,
        expected_s: float | None,
        now_s: float = 0.0,
        pace: Pace | None = None,
    ) -> WakeForecast | None:
        """Returns when a tool call that begins will be over.

        Args:
            tool_name: Empty: unnamed.
            expected_s: The client's estimate, if it gave one.
            now_s: When it begins.
            pace: Its agent's; None: nothing is known of the agent.

        Returns:
            None if nothing at all is known.
        """
        tool = self._tools.get(tool_name) if tool_name else None
        if tool is not None:
            self._tools.move_to_end(tool_name)
        found = self._predict(tool, expected_s, now_s)
        if found is None or pace is None:
            return found
        judged = tool or self._all
        known = judged.plain_error.weight >= self._enough
        if not known or judged.paced_error.mean >= _CLEARLY * judged.plain_error.mean:
            return found
        factor = pace.factor
        return WakeForecast(
            found.since_s, found.unit_s * factor, found.shape, found.source, pace=factor
        )

    def predict_silence(self, now_s: float) -> WakeForecast | None:
        """Returns when a session that signals nothing will run again, its Generate just over."""
        if self._silence.weight < self._enough:
            return None
        return WakeForecast(now_s, 1.0, self._silence.quantiles(*SHARES), Source.SILENCE)

    def _predict(
        self, tool: _Tool | None, expected_s: float | None, now_s: float
    ) -> WakeForecast | None:
        own = tool is not None and tool.durations.weight >= self._enough
        if expected_s is not None and not (tool is not None and own and self._hint_is_worse(tool)):
            return self._from_hint(tool, expected_s, now_s)
        if tool is not None and own:
            return WakeForecast(now_s, 1.0, tool.durations.quantiles(*SHARES), Source.TOOL)
        if self._all.durations.weight >= self._enough:
            shape = self._all.durations.quantiles(*SHARES)
            return WakeForecast(now_s, 1.0, shape, Source.POPULATION)
        return None

    def _from_hint(self, tool: _Tool | None, expected_s: float, now_s: float) -> WakeForecast:
        shape = self._ratio_shape(tool)
        if shape is None:
            return from_hint(now_s, expected_s)
        return WakeForecast(now_s, expected_s, shape, Source.HINT)

    def _ratio_shape(self, tool: _Tool | None) -> tuple[float, ...] | None:
        known = tool is not None and tool.ratios.weight >= self._enough
        ratios = tool.ratios if tool is not None and known else self._all.ratios
        return ratios.quantiles(*SHARES) if ratios.weight >= self._enough else None

    def _hint_is_worse(self, tool: _Tool) -> bool:
        return (
            tool.hint_error.weight >= self._enough
            and tool.own_error.weight >= self._enough
            and tool.own_error.mean < _CLEARLY * tool.hint_error.mean - 0.01
        )

    def _score(self, tool: _Tool, expected_s: float | None, duration_s: float) -> None:
        """Notes how far off the tool's numbers and its corrected estimates would have been."""
        if tool.durations.weight >= self._enough:
            (own_s,) = tool.durations.quantiles(0.5)
            tool.own_error.add(math.log(duration_s / own_s))
        if expected_s and tool.ratios.weight >= self._enough:
            (ratio,) = tool.ratios.quantiles(0.5)
            tool.hint_error.add(math.log(duration_s / (expected_s * ratio)))

    @staticmethod
    def _learn_pace(
        judged: _Tool, forecast: WakeForecast, pace: Pace | None, duration_s: float
    ) -> None:
        if pace is None:
            return
        off = math.log(duration_s * forecast.pace / forecast.median_s)
        if pace.weight:
            judged.plain_error.add(off)
            judged.paced_error.add(off - math.log(pace.factor))
        pace.add(off)

    def _tool(self, name: str) -> _Tool:
        tool = self._tools.get(name)
        if tool is None:
            if len(self._tools) >= self._most_tools:
                self._tools.popitem(last=False)
            tool = self._tools[name] = _Tool()
        self._tools.move_to_end(name)
        return tool
