"""The policy of engines that know nothing of phases."""

from __future__ import annotations

from collections.abc import Sequence

from services.scheduler.policy.base import (
    NOTHING,
    Cause,
    Decision,
    PolicyCommand,
    PolicyOptions,
)
from services.scheduler.policy.view import SessionView, SystemView


class ReactiveLru:
    """Commands nothing: under pressure the worker evicts what was least recently used."""

    name = "reactive-lru"
    uses_signals = False

    def __init__(self, options: PolicyOptions) -> None:
        del options

    def decide(
        self, cause: Cause, session: SessionView, system: SystemView, now_s: float
    ) -> Decision:
        """Returns that there is nothing to do."""
        del cause, session, system, now_s
        return NOTHING

    def on_tick(self, system: SystemView, now_s: float) -> Sequence[PolicyCommand]:
        """Returns nothing."""
        del system, now_s
        return ()
