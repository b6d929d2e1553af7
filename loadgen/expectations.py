"""Which results a workload file can put bounds on, and in which direction."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from enum import Enum

import msgspec


class Verdict(Enum):
    """How a bound fared. ``void``: the value cannot be trusted or does not exist."""

    PASS = "pass"
    FAIL = "fail"
    VOID = "void"


class Check(msgspec.Struct, frozen=True):
    """One bound and how it fared.

    Attributes:
        name: The bound as the workload file names it.
        result: The aggregate it was checked against.
        relation: ``">"``, ``"<"``, ``">="`` or ``"<="``.
        bound: What the result is compared with, in the result's unit.
        value: The result; None: the run has none.
        verdict: The outcome.
        reason: Why, where the verdict is void.
    """

    name: str
    result: str
    relation: str
    bound: float
    value: float | None
    verdict: Verdict
    reason: str = ""


# Names that the seed's files use for results of another name here.
ALIASES: Mapping[str, str] = {
    "p99_request_latency_ms": "p99_latency_ms",
    "restores": "restore_events",
    "swaps": "swap_events",
}

_DISTRIBUTIONS = (
    "latency_ms",
    "reason_latency_ms",
    "reflect_latency_ms",
    "wake_latency_ms",
    "wake_moved_latency_ms",
    "wake_resident_latency_ms",
    "wake_recomputed_latency_ms",
    "ttft_ms",
    "itl_ms",
    "tpot_ms",
    "open_latency_ms",
)
_QUANTILES = ("p50", "p90", "p99")
LATENCIES: tuple[str, ...] = tuple(f"{q}_{d}" for d in _DISTRIBUTIONS for q in _QUANTILES)
_AT_LEAST = ("success_count", "throughput_ops_per_sec", "output_tokens_per_sec")
_AT_MOST = (
    "duration_s",
    "failed_count",
    "refusals",
    "resends",
    "recomputed_tokens",
    "prefilled_tokens",
    "preemptions",
    "drops",
)
_COUNTS = (
    "swap_events",
    "restore_events",
    "swap_bytes",
    "restore_bytes",
    "evictions",
    "sessions_restored",
    "prefetches",
    "resident_hit_blocks",
    "wakes",
    "wakes_moved",
    "wakes_resident",
    "wakes_recomputed",
)
RESULTS: tuple[str, ...] = (*LATENCIES, *_AT_LEAST, *_AT_MOST, *_COUNTS)

_SUFFIXES: Mapping[str, str] = {"_gt": ">", "_lt": "<", "_ge": ">=", "_le": "<="}
_COMPARE: Mapping[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    "<": operator.lt,
    ">=": operator.ge,
    "<=": operator.le,
}


def resolve(name: str) -> tuple[str, str] | None:
    """Returns the result that a bound's name speaks of and the relation it asks for.

    A name that ends in ``_gt``, ``_lt``, ``_ge`` or ``_le`` says the relation itself. Without one,
    latencies and costs are to be at most the bound, and successes and rates at least.

    Returns:
        Result and relation; None if there is no such result, or no relation in its name.
    """
    relation = _SUFFIXES.get(name[-3:])
    stem = name[:-3] if relation else name
    result = ALIASES.get(stem, stem)
    if result not in RESULTS:
        return None
    if relation is None:
        if result in LATENCIES or result in _AT_MOST:
            relation = "<="
        elif result in _AT_LEAST:
            relation = ">="
        else:
            return None
    return result, relation


def known(name: str) -> bool:
    """Returns whether a workload file may put a bound of this name."""
    return resolve(name) is not None


def names() -> tuple[str, ...]:
    """Returns the usual names of bounds, for hints in errors."""
    plain = (*ALIASES, *RESULTS)
    return tuple(name if known(name) else f"{name}_gt" for name in plain)


def check(
    name: str, bound: float, results: Mapping[str, float | None], latency_problem: str
) -> Check:
    """Checks one bound.

    Args:
        name: The bound's name; must be known.
        bound: Its value.
        results: Aggregates by name.
        latency_problem: Why the run's latencies cannot be trusted; empty: they can.

    Returns:
        The bound with its verdict.

    Raises:
        KeyError: The name is not known.
    """
    resolved = resolve(name)
    if resolved is None:
        raise KeyError(name)
    result, relation = resolved
    value = results.get(result)
    if value is None:
        return Check(name, result, relation, bound, None, Verdict.VOID, "the run has no such value")
    if latency_problem and result in LATENCIES:
        return Check(name, result, relation, bound, value, Verdict.VOID, latency_problem)
    verdict = Verdict.PASS if _COMPARE[relation](value, bound) else Verdict.FAIL
    return Check(name, result, relation, bound, value, verdict)
