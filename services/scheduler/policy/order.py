"""What workers are told of when sessions wake, which is the order in which they reuse blocks.

A worker reuses the blocks of the furthest expected wake first. What it was told wears out: once the
time has passed it would hold on to that session before all others. So it is told anew then, with
what is to be expected of one that has waited this long, each time at least a quarter of the wait
later: about ten times for each tenfold of waiting, however long the agent stays away.
"""

from __future__ import annotations

from typing import Final

from services.scheduler.forecast import WakeForecast, from_hint
from services.scheduler.policy.view import SessionView

LEAST_STEP_S: Final = 1.0
LEAST_STEP_SHARE: Final = 0.25


def forecast_of(session: SessionView) -> WakeForecast | None:
    """Returns what is known of when a session wakes; None: nothing.

    Of a session that has come from a worker's record there is only the time.
    """
    if session.forecast is not None or session.expected_wake_s is None:
        return session.forecast
    expected_s = session.expected_wake_s - session.phase_since_s
    return from_hint(session.phase_since_s, expected_s) if expected_s > 0 else None


def wake_to_tell(session: SessionView, now_s: float) -> float | None:
    """Returns when to say that a session is expected; None: no idea, taken as far."""
    told_s = session.expected_wake_s
    if told_s is not None and told_s > now_s:
        return told_s
    forecast = forecast_of(session)
    if forecast is None:
        return None
    if told_s is None:
        return forecast.wake_s(0.5, now_s)
    step_s = max(LEAST_STEP_S, LEAST_STEP_SHARE * (now_s - forecast.since_s))
    return max(forecast.wake_s(0.5, now_s), now_s + step_s)
