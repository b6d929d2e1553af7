"""How much new work a worker may be given.

What is limited is work at once, not sessions alive: a session always fits as tokens. Three things
keep a worker from more: as many requests at once as two full steps take; prompts let in and not yet
computed that fill `backlog_s` of its time, so that new agents come as fast as their prompts are
computed and no faster; and KV lost and prefilled again for more than `recompute_share` of its time,
when each new agent would only take away what another needs. All three fall by themselves as the
work is done.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from services.scheduler.policy import cost
from services.scheduler.policy.view import WorkerView

RECHECK_S: Final = 1.0
"""When to look again at what falls by no rate that is known: as often as workers report."""

# One that runs, and one that waits behind it.
_FULL_STEPS = 2


@dataclass(frozen=True, slots=True)
class Room:
    """What a worker may be given.

    Attributes:
        sessions: How many more sessions.
        tokens: How many more tokens of their prompts, all together; the first session of an idle
            worker may have more.
        tokens_per_s: How fast that grows as prompts are computed; 0: it does not by itself.
        reason: What limits it; empty: nothing does.
    """

    sessions: float = math.inf
    tokens: float = math.inf
    tokens_per_s: float = 0.0
    reason: str = ""


UNLIMITED: Final = Room()


def work_room(worker: WorkerView, backlog_s: float, recompute_share: float) -> Room:
    """Returns how much new work a worker may be given so that those it has do not suffer.

    Args:
        worker: The worker.
        backlog_s: How long its prompts that are let in may take.
        recompute_share: Most of its time that may go to prefilling again.
    """
    at_once = worker.running_sequences + worker.waiting_requests + worker.opened
    most_at_once = _FULL_STEPS * worker.max_running_sequences or math.inf
    if at_once >= most_at_once:
        return Room(0, 0, reason=f"{at_once} requests at once")
    if worker.recompute_share > recompute_share:
        return Room(0, 0, reason=f"{worker.recompute_share:.0%} of its time recomputes lost KV")
    speed = worker.prefill_tokens_per_s or cost.ASSUMED_PREFILL_TOKENS_PER_S
    limit = backlog_s * speed
    sessions = most_at_once - at_once
    if not worker.prompt_tokens:
        return Room(sessions, max(limit, worker.max_context_length), speed)
    room = max(0.0, limit - worker.prompt_tokens)
    reason = f"{worker.prompt_tokens} tokens of prompts to compute"
    return Room(sessions, room, speed, reason)
