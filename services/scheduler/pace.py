"""How one agent differs from the others in how long its tools take."""

from __future__ import annotations

import math
from dataclasses import dataclass

_PRIOR_CALLS = 3.0
_DECAY = 0.9


@dataclass(slots=True)
class Pace:
    """By which factor one agent's tool calls take longer than other agents'.

    It is drawn towards 1 while little is known of the agent: the mean of the logarithms is taken
    over `_PRIOR_CALLS` calls more than were seen, as if those had been like everybody's (shrinkage,
    as in empirical Bayes).

    Attributes:
        weight: Calls seen, older ones counting less.
        log_sum: Sum of the logarithms of how much longer than expected they took.
    """

    weight: float = 0.0
    log_sum: float = 0.0

    @property
    def factor(self) -> float:
        """What to multiply a prediction by."""
        return math.exp(self.log_sum / (self.weight + _PRIOR_CALLS))

    def add(self, log_ratio: float) -> None:
        """Takes in one call's logarithm of actual over expected duration."""
        self.weight = self.weight * _DECAY + 1.0
        self.log_sum = self.log_sum * _DECAY + log_ratio
