"""Where each millisecond of a wake went, from the spans of its trace.

A wake has two branches: the signal, which starts the load, and the Generate, which waits for it.
They run side by side, so their spans do not add up to the wake. Here each moment belongs to one
stage only: the one furthest on among those under way, since what is behind it no longer holds the
wake up. So the stages add up to the wake, and what no span covers is said to be unaccounted for.

All times are wall-clock times of the processes that recorded them. On one host they agree; between
hosts the difference of the clocks moves time from one stage to its neighbour, and `Stages.skew_ms`
shows it where it is large enough to put an effect before its cause.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec

from loadgen.spans import WAKE, Span


class Stages(msgspec.Struct, frozen=True, kw_only=True):
    """One wake's time by stage, in ms; the stages and `unaccounted_ms` add up to `total_ms`.

    Attributes:
        total_ms: COMPUTE sent to first token received, on the client's clock.
        signal_ms: COMPUTE sent to received by the scheduler.
        decision_ms: To the policy's decision, and its command in the send queue.
        command_ms: To the command taken on by the engine.
        load_ms: To the KV back on the device; nearly 0 if it was still there.
        request_ms: Nothing above goes on, and the Generate has not reached the worker yet.
        queue_ms: It has, and waits for its first step: tokenizing included, load not.
        step_ms: First step launched to first token collected by the engine.
        return_ms: To the first token received by the client.
        unaccounted_ms: What no span covers.
        skew_ms: By how much a span begins before its cause at most: the clocks of the processes
            differ by at least as much.
    """

    total_ms: float
    signal_ms: float = 0.0
    decision_ms: float = 0.0
    command_ms: float = 0.0
    load_ms: float = 0.0
    request_ms: float = 0.0
    queue_ms: float = 0.0
    step_ms: float = 0.0
    return_ms: float = 0.0
    unaccounted_ms: float = 0.0
    skew_ms: float = 0.0

    def __str__(self) -> str:
        """Returns the sum as one line."""
        parts = [f"{name} {getattr(self, f'{name}_ms'):.1f}" for name in STAGES]
        if self.unaccounted_ms >= _SHOWN_MS:
            parts.append(f"unaccounted {self.unaccounted_ms:.1f}")
        line = f"{self.total_ms:.1f} ms = {' + '.join(parts)}"
        if self.skew_ms >= _SHOWN_MS:
            line += f" (the clocks differ by {self.skew_ms:.1f} ms or more)"
        return line


STAGES = ("signal", "decision", "command", "load", "request", "queue", "step", "return")
"""The stages' names, in the order in which a wake goes through them."""

_SHOWN_MS = 0.05


class _Interval(NamedTuple):
    stage: str
    start_ns: int
    end_ns: int


def stages_of(spans: Sequence[Span]) -> Stages | None:
    """Returns where the time of a wake went.

    Args:
        spans: All spans of one trace, in any order; those of the servers may be missing.

    Returns:
        The stages; None if the trace is not that of a wake.
    """
    wake = next((span for span in spans if span.name == WAKE), None)
    if wake is None:
        return None
    by_stage = _shares(_intervals(spans, wake), wake.start_ns, wake.end_ns)
    total_ns = wake.end_ns - wake.start_ns
    return Stages(
        total_ms=total_ns * 1e-6,
        unaccounted_ms=(total_ns - sum(by_stage.values())) * 1e-6,
        skew_ms=_skew_ns(spans) * 1e-6,
        **{f"{stage}_ms": length_ns * 1e-6 for stage, length_ns in by_stage.items()},
    )


def _intervals(spans: Sequence[Span], wake: Span) -> list[_Interval]:
    """Returns when each stage was under way, furthest on first."""
    heard = _first(_below(spans, _below(spans, [wake], "signal_phase"), "signal_phase"))
    decided = _first(_below(spans, [heard] if heard else [], "policy.decide"))
    commanded = _first(_below(spans, [decided] if decided else [], "kv.restore"))
    served = _served(_below(spans, _below(spans, [wake], "generate"), "generate"))
    loaded = _first(_below(spans, [served] if served else [], "kv.restore"))
    stepped = _first(_below(spans, [served] if served else [], "prefill"))
    found: list[_Interval] = []
    if stepped is not None:
        found.append(_Interval("return", stepped.end_ns, wake.end_ns))
        found.append(_Interval("step", stepped.start_ns, stepped.end_ns))
    if loaded is not None:
        found.append(_Interval("load", loaded.start_ns, loaded.end_ns))
    taken_ns = 0
    if commanded is not None:
        taken = (event.time_ns for event in commanded.events if event.name == "taken")
        taken_ns = next(taken, commanded.start_ns)
        found.append(_Interval("load", taken_ns, commanded.end_ns))
    if served is not None:
        # With the request at hand the worker needs no signal any more to go on.
        queue_end_ns = stepped.start_ns if stepped is not None else served.end_ns
        found.append(_Interval("queue", served.start_ns, queue_end_ns))
    if decided is not None and taken_ns:
        found.append(_Interval("command", decided.end_ns, taken_ns))
    if heard is not None:
        end_ns = decided.end_ns if decided is not None else heard.end_ns
        found.append(_Interval("decision", heard.start_ns, end_ns))
        found.append(_Interval("signal", wake.start_ns, heard.start_ns))
    if served is not None:
        found.append(_Interval("request", wake.start_ns, served.start_ns))
    return found


def _shares(intervals: Sequence[_Interval], start_ns: int, end_ns: int) -> dict[str, int]:
    """Deals out the time from start to end, each moment to the first interval that covers it."""
    shares = dict.fromkeys(STAGES, 0)
    bounds = {start_ns, end_ns}
    for interval in intervals:
        bounds.update(ns for ns in interval[1:] if start_ns < ns < end_ns)
    moments = sorted(bounds)
    for begin, end in itertools.pairwise(moments):
        for interval in intervals:
            if interval.start_ns <= begin and end <= interval.end_ns:
                shares[interval.stage] += end - begin
                break
    return shares


def _below(spans: Iterable[Span], parents: Iterable[Span], name: str) -> list[Span]:
    """Returns the spans of a name under any of `parents`, earliest first."""
    ids = {parent.span_id for parent in parents}
    found = [span for span in spans if span.name == name and span.parent_id in ids]
    return sorted(found, key=lambda span: span.start_ns)


def _first(spans: Sequence[Span]) -> Span | None:
    return spans[0] if spans else None


def _served(attempts: Sequence[Span]) -> Span | None:
    """Returns the worker's attempt that made the first token: the first that made any."""
    for span in attempts:
        if any(event.name == "first_token" for event in span.events):
            return span
    return attempts[-1] if attempts else None


def _skew_ns(spans: Sequence[Span]) -> int:
    starts = {span.span_id: span.start_ns for span in spans}
    early = (starts[span.parent_id] - span.start_ns for span in spans if span.parent_id in starts)
    return max(0, *early, 0)
