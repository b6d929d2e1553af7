"""What it costs to keep, to evict or to drop a waiting session's KV.

The unit is seconds of delay, added up over all agents, that a choice is expected to bring until the
session has woken. It is InferCept's comparison of waste (Abhyankar et al., "InferCept: Efficient
Intercept Support for Augmented Large Language Model Inference", 2024: preserve, discard or swap an
intercepted request, whichever wastes least memory over time) with memory priced in the delay that
it would have saved others, so that the three can be added to the waking agent's own delay.

With `B` the session's bytes, `w` the mean time until it wakes given how long it has waited, `W` the
same for the middle one of the worker's sessions that are away, `R` the requests that run, and
`p` and `h` how far the device and the host pool are short of room, from 0 to 1::

    load    = B / load speed                          the agent's own wait for its KV
    prefill = tokens / prefill speed                  the same if it is computed again
    keep    = p * load * w / W                        others must load what finds no room meanwhile
    evict   = p * (load * (1 + 0.03 * R) + loads queued * load)
            + p * h * prefill * (1 + R) * w / W       others must compute what the host has not
    drop    = prefill * (1 + R)                       a step that prefills delays whoever decodes
            + requests queued * step

Where there is room (`p` = 0) to keep costs nothing, and to evict neither: an eviction is lazy and
finds its blocks again. Where there is not, to keep is cheaper exactly for those that wake sooner
than the middle one does, which is the rule of the furthest expected wake (Belady, "A study of
replacement algorithms for a virtual-storage computer", 1966) and what a fixed time-to-live
(Continuum, 2025) and least recently used (vLLM, LMCache) approximate without knowing `w`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from services.scheduler.domain import PoolState
from services.scheduler.policy.view import SessionView, WorkerView

ASSUMED_LOAD_BYTES_PER_S: Final = 20e9
"""Until a worker has measured its own: what a PCIe 4.0 link with 16 lanes does in practice."""

ASSUMED_PREFILL_TOKENS_PER_S: Final = 10e3
"""Until a worker has measured its own: a 7B model on a GPU of 2020."""

ASSUMED_WAIT_S: Final = 10.0
"""How long a wait lasts of which nothing at all is known."""

COPY_INTERFERENCE: Final = 0.03
"""By how much a copy to the device slows the steps beside it; measured on an H200."""

SHORT: Final = 0.1
"""A pool with less than this share of its blocks to spare begins to be short of room."""


class Choice(Enum):
    """What can be done with a waiting session's KV."""

    KEEP = "keep"
    EVICT = "evict"
    DROP = "drop"


@dataclass(frozen=True, slots=True)
class Costs:
    """What each choice costs, and what that follows from; times in seconds.

    Attributes:
        keep_s: Expected delay, over all agents, if its device blocks stay its own.
        evict_s: If they may be reused, and are loaded again when it wakes.
        drop_s: If its KV is forgotten, and computed again when it wakes.
        remaining_s: Mean time until it wakes, given how long it has waited.
        middle_s: The same of the middle one of the worker's sessions that are away.
        load_s: Time to load all of its blocks.
        prefill_s: Time to compute all of its context.
        device_pressure: How far the device pool is short of room, from 0 to 1.
        host_pressure: How far the host pool is.
        measured: Both speeds are the worker's own; false: one of them is assumed.
    """

    keep_s: float
    evict_s: float
    drop_s: float
    remaining_s: float
    middle_s: float
    load_s: float
    prefill_s: float
    device_pressure: float
    host_pressure: float
    measured: bool

    @property
    def best(self) -> Choice:
        """The choice that costs least; of equals the first of keep, evict, drop."""
        ranked = (
            (self.keep_s, Choice.KEEP),
            (self.evict_s, Choice.EVICT),
            (self.drop_s, Choice.DROP),
        )
        return min(ranked, key=lambda pair: pair[0])[1]


def costs(
    session: SessionView, worker: WorkerView, middle_wake_s: float | None, now_s: float
) -> Costs:
    """Returns what each choice about a session costs.

    Args:
        session: A session that waits.
        worker: Its worker.
        middle_wake_s: When the middle one of the worker's sessions that are away is expected.
        now_s: The time.
    """
    remaining_s = remaining(session, now_s)
    middle_s = max(0.001, middle_wake_s - now_s) if middle_wake_s is not None else remaining_s
    load_s = load(worker, session.kv.total_blocks)
    prefill_s = prefill(worker, session.context_length)
    device = pressure(worker.device)
    host = pressure(worker.host)
    others = worker.running_sequences
    longer = remaining_s / max(middle_s, 0.001)
    queue_s = worker.loads_in_flight * load_s
    waiting_s = worker.waiting_requests * (worker.mean_step_s or 0.0)
    again_s = prefill_s * (1 + others)
    moved_s = load_s * (1 + COPY_INTERFERENCE * others) + queue_s
    return Costs(
        keep_s=device * load_s * longer,
        evict_s=device * moved_s + device * host * again_s * longer,
        drop_s=again_s + waiting_s,
        remaining_s=remaining_s,
        middle_s=middle_s,
        load_s=load_s,
        prefill_s=prefill_s,
        device_pressure=device,
        host_pressure=host,
        measured=worker.load_bytes_per_s > 0 and worker.prefill_tokens_per_s > 0,
    )


def remaining(session: SessionView, now_s: float) -> float:
    """Returns for how much longer a session is expected to wait, in seconds."""
    if session.forecast is not None:
        return session.forecast.remaining_s(now_s)
    waited_s = max(0.0, now_s - session.last_active_s)
    if session.expected_wake_s is not None and session.expected_wake_s > now_s:
        return session.expected_wake_s - now_s
    # Of those of whom nothing is known, who has waited longest will wait longest.
    return max(ASSUMED_WAIT_S, waited_s)


def load(worker: WorkerView, blocks: int) -> float:
    """Returns how long a worker takes to load blocks to its device, in seconds."""
    speed = worker.load_bytes_per_s or ASSUMED_LOAD_BYTES_PER_S
    return blocks * worker.block_bytes / speed


def prefill(worker: WorkerView, tokens: int) -> float:
    """Returns how long a worker takes to compute tokens of context, in seconds."""
    return tokens / (worker.prefill_tokens_per_s or ASSUMED_PREFILL_TOKENS_PER_S)


def pressure(pool: PoolState) -> float:
    """Returns how far a pool is short of room: 0 with `SHORT` of it to spare, 1 with nothing."""
    if not pool.total:
        return 1.0
    spare = pool.free + pool.reclaimable
    return max(0.0, 1.0 - spare / (SHORT * pool.total))
