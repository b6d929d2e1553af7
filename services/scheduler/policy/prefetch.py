"""Which sessions come back before they say that they wake.

A session is wanted back from when one in ten such would have woken, less the time that its load
takes, if its blocks may have been reused. It comes when the device has room that no wake needs and
the link has little to do, nearest wake first. One that has not woken by when nineteen in twenty
would have is let go again: clean as it is, that moves nothing, and it is not fetched twice for one
wake.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from services.scheduler.domain import Prefetch
from services.scheduler.policy import cost
from services.scheduler.policy.base import PolicyCommand, moved_to_host
from services.scheduler.policy.order import forecast_of
from services.scheduler.policy.view import SessionView, WorkerView

EARLY: Final = 0.1
LATE: Final = 0.95

RESERVE: Final = 0.05
"""Share of the device pool that prefetches leave to wakes and new prompts."""

AT_ONCE: Final = 4
"""Prefetches of one worker under way at most, so that a wake's load finds the link nearly idle."""

_LEAD_FACTOR = 2.0
_LEAD_S = 0.1


def due_s(session: SessionView, worker: WorkerView) -> float | None:
    """Returns from when a session that is away is wanted back; None: nobody knows, or no more."""
    forecast = forecast_of(session)
    if forecast is None or session.prefetched:
        return None
    lead_s = _LEAD_S + _LEAD_FACTOR * cost.load(worker, session.kv.total_blocks)
    return forecast.since_s + forecast.quantile_s(EARLY) - lead_s


def give_up_s(session: SessionView) -> float | None:
    """Returns until when a session that was fetched is waited for; None: nobody knows."""
    forecast = forecast_of(session)
    if forecast is None:
        return None
    return max(forecast.since_s + forecast.quantile_s(LATE), session.expected_wake_s or 0.0)


def may_be_gone(session: SessionView, worker: WorkerView) -> bool:
    """Whether any of the blocks that a session let go may have been reused since."""
    if not session.kv.host_blocks or not moved_to_host(session):
        return False
    if session.kv.device_blocks < session.kv.total_blocks or session.evicted_s is None:
        return True
    return worker.full_s is not None and worker.full_s >= session.evicted_s


def room_blocks(worker: WorkerView) -> int:
    """Returns how many device blocks prefetches may still take."""
    if worker.prefetch_refused:
        return 0
    spare = worker.device.free + worker.device.reclaimable
    promised = worker.prefetched_blocks + worker.unreported_blocks
    return spare - promised - int(RESERVE * worker.device.total)


def choose(
    worker: WorkerView, wanting: Iterable[SessionView], under_way: int
) -> list[PolicyCommand]:
    """Returns the prefetches to start now.

    Args:
        worker: Whose sessions.
        wanting: Sessions that are wanted back, nearest wake first.
        under_way: Prefetches of the worker that have not ended.
    """
    room = room_blocks(worker)
    chosen: list[PolicyCommand] = []
    if under_way >= AT_ONCE or room <= 0:
        return chosen
    for session in wanting:
        room -= session.kv.total_blocks
        # Who wakes later does not overtake: what it took would be missing a moment later.
        if room < 0 or under_way + len(chosen) >= AT_ONCE:
            break
        chosen.append(PolicyCommand(session.session_id, Prefetch(), "wakes soon"))
    return chosen
