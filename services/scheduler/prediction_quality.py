"""How good predictions of wakes are, measured on the wakes that come.

Three measures, all over recent wakes: the median absolute error of the median, in seconds; the
coverage, which is the share of wakes that fell between the first and the ninth decile, to be
compared with 0.8; and the pinball loss in seconds, the mean over deciles 1, 5 and 9 of
``max(q * (t - p), (q - 1) * (t - p))``, which is least when each is the true quantile (Koenker and
Bassett, "Regression quantiles", 1978).
"""

from __future__ import annotations

from dataclasses import dataclass

from services.scheduler.forecast import Source, WakeForecast
from services.scheduler.histogram import DecayingHistogram

_DECAY = 0.99
_DECILES = (0.1, 0.5, 0.9)


@dataclass(frozen=True, slots=True)
class Quality:
    """How good the predictions of one source are.

    Attributes:
        wakes: Wakes that were predicted and came, since the start.
        median_error_s: Median of the absolute errors of late.
        coverage: Share of late that fell between the first and the ninth decile.
        pinball_s: Mean pinball loss of late.
    """

    wakes: int
    median_error_s: float
    coverage: float
    pinball_s: float


class _Tally:
    __slots__ = ("covered", "errors", "pinball_s", "wakes", "weight")

    def __init__(self) -> None:
        self.wakes = 0
        self.weight = 0.0
        self.covered = 0.0
        self.pinball_s = 0.0
        self.errors = DecayingHistogram(low=0.001, decay=_DECAY)


class PredictionQuality:
    """Compares predictions with what came.

    Attributes:
        unpredicted: Wakes of which nothing had been predicted.
    """

    def __init__(self) -> None:
        self.unpredicted = 0
        self._tallies: dict[Source, _Tally] = {}

    def observe(self, forecast: WakeForecast | None, duration_s: float) -> None:
        """Takes in a wait that has ended, and what had been predicted of it."""
        if forecast is None:
            self.unpredicted += 1
            return
        tally = self._tallies.get(forecast.source)
        if tally is None:
            tally = self._tallies[forecast.source] = _Tally()
        early_s, median_s, late_s = (forecast.quantile_s(share) for share in _DECILES)
        loss_s = 0.0
        for share, predicted_s in zip(_DECILES, (early_s, median_s, late_s), strict=True):
            over_s = duration_s - predicted_s
            loss_s += max(share * over_s, (share - 1.0) * over_s)
        tally.wakes += 1
        tally.weight = tally.weight * _DECAY + 1.0
        tally.covered = tally.covered * _DECAY + (early_s <= duration_s <= late_s)
        tally.pinball_s = tally.pinball_s * _DECAY + loss_s / len(_DECILES)
        tally.errors.add(abs(duration_s - median_s))

    def by_source(self) -> dict[Source, Quality]:
        """Returns how good each source is that has been asked."""
        return {
            source: Quality(
                wakes=tally.wakes,
                median_error_s=tally.errors.quantiles(0.5)[0],
                coverage=tally.covered / tally.weight,
                pinball_s=tally.pinball_s / tally.weight,
            )
            for source, tally in self._tallies.items()
        }
