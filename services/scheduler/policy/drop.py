"""Which sessions lose their KV when neither pool has room for it.

Something must go then. The loss is what it costs to compute it again, once the session wakes, so
per block and second of room won it is ``(drop - evict) / (host blocks * remaining wait)``: the
least goes first. For sessions of one size that is the furthest wake; of two that wake together it
is the one that is cheaper to compute per block (as in GreedyDual-Size, Cao and Irani, 1997).
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Final

from services.scheduler.domain import Drop
from services.scheduler.policy import cost
from services.scheduler.policy.base import PolicyCommand
from services.scheduler.policy.view import SessionView, WorkerView

DEVICE_LOW: Final = 0.1
"""A device pool with less than this share of its blocks to spare is full. Workers keep half as much
available by themselves: those who are worth least shall be gone before they choose."""

HOST_LOW: Final = 0.02
"""A host pool with less than this share of its blocks to spare is full."""

LOOKED_AT: Final = 32
"""How many of the furthest sessions are compared."""

AT_ONCE: Final = 8
"""How many are dropped at one look at most."""


def blocks_needed(worker: WorkerView) -> int:
    """Returns how many host blocks must be won; 0 unless both pools are full."""
    device, host = worker.device, worker.host
    if not host.total or device.free + device.reclaimable >= DEVICE_LOW * device.total:
        return 0
    spare = host.free + host.reclaimable + worker.dropped_blocks
    return max(0, int(HOST_LOW * host.total) - spare)


def choose(
    worker: WorkerView, away: Iterable[SessionView], middle_wake_s: float | None, now_s: float
) -> list[PolicyCommand]:
    """Returns the drops that win the room needed.

    Args:
        worker: Whose sessions.
        away: Those whose device blocks were let go, furthest wake first.
        middle_wake_s: When the middle one of them is expected.
        now_s: The time.
    """
    needed = blocks_needed(worker)
    if not needed:
        return []
    ranked = sorted(
        (
            (_loss(session, worker, middle_wake_s, now_s), session.session_id, session)
            for session in islice(away, LOOKED_AT)
            if session.kv.host_blocks and not session.moving and not session.generating
        ),
        key=lambda entry: entry[:2],
    )
    chosen: list[PolicyCommand] = []
    for _, _, session in ranked[:AT_ONCE]:
        if needed <= 0:
            break
        needed -= session.kv.host_blocks
        chosen.append(PolicyCommand(session.session_id, Drop(), "both pools are full"))
    return chosen


def _loss(
    session: SessionView, worker: WorkerView, middle_wake_s: float | None, now_s: float
) -> float:
    found = cost.costs(session, worker, middle_wake_s, now_s)
    lost_s = max(0.0, found.drop_s - found.load_s)
    return lost_s / (session.kv.host_blocks * max(found.remaining_s, 0.001))
