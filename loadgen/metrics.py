"""Everything a report says, computed from a run's records: a pure function.

Quantiles are nearest-rank: each is a value that was really measured. README.md explains each row.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from enum import Enum

import msgspec

from loadgen import expectations
from loadgen.expectations import Check, Verdict
from loadgen.record import AgentRecord, Failure, Record, RequestRecord, RunInfo, StatsRecord

LAG_LIMIT_MS = 1.0
"""An event loop later than this at p99 could not have measured the latencies."""


class Distribution(msgspec.Struct, frozen=True):
    """Quantiles of one measurement.

    Attributes:
        count: Values measured.
        mean: Their mean; None where there are none, as with all that follows.
        p50: Half of the values are at most this.
        p90: Nine of ten.
        p99: 99 of 100.
        max: All.
    """

    count: int = 0
    mean: float | None = None
    p50: float | None = None
    p90: float | None = None
    p99: float | None = None
    max: float | None = None


class WakeSource(Enum):
    """Where the KV of a session that woke was found.

    ``moved``: at least one block was copied from the host. ``recomputed``: some had to be computed
    again. ``resident``: all of it was on the device already. ``unknown``: the server did not say.
    """

    MOVED = "moved"
    RESIDENT = "resident"
    RECOMPUTED = "recomputed"
    UNKNOWN = "unknown"


class AgentResult(msgspec.Struct, frozen=True):
    """What one agent saw.

    Attributes:
        agent: Its index.
        name: Its name.
        arrival_time_s: When it arrived, as scheduled.
        reason_latency_ms: From then to the last token of its first request; None: it has none.
        wake_latency_ms: Its slowest wake; None: it never woke.
        wake_latencies_ms: All its wakes, in order.
        requests: Requests that ended well.
        ok: Whether it got to its end without an error.
        error: Why not.
    """

    agent: int
    name: str
    arrival_time_s: float
    reason_latency_ms: float | None
    wake_latency_ms: float | None
    wake_latencies_ms: list[float]
    requests: int
    ok: bool
    error: Failure | None


class ErrorCount(msgspec.Struct, frozen=True):
    """How many agents failed for one reason, and what the first of them was told."""

    reason: str
    count: int
    message: str


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """A run's results.

    Attributes:
        name: The experiment.
        target: What was driven.
        server: Where.
        model: What it served.
        policy: The scheduler's policy; empty: unknown.
        labels: As in the run.
        interrupted: The run was stopped before its end.
        latency_problem: Why latencies cannot be trusted; empty: they can.
        aggregates: Each aggregated result by name; None: the run has no such value.
        distributions: The distributions behind the latency results, in milliseconds.
        agents: Each agent, in order of arrival.
        errors: Why agents failed, most frequent first.
        checks: The bounds and how they fared.
    """

    name: str
    target: str
    server: str
    model: str
    policy: str
    labels: list[str]
    interrupted: bool
    latency_problem: str
    aggregates: dict[str, float | None]
    distributions: dict[str, Distribution]
    agents: list[AgentResult]
    errors: list[ErrorCount]
    checks: list[Check]

    @property
    def passed(self) -> bool:
        """Whether every bound holds."""
        return all(check.verdict is Verdict.PASS for check in self.checks)


def quantile(ordered: Sequence[float], fraction: float) -> float:
    """Returns the nearest-rank quantile of values in rising order; there is at least one."""
    return ordered[max(0, math.ceil(fraction * len(ordered)) - 1)]


def distribution(values: Iterable[float]) -> Distribution:
    """Returns the quantiles of some values, in any order."""
    ordered = sorted(values)
    if not ordered:
        return Distribution()
    return Distribution(
        count=len(ordered),
        mean=sum(ordered) / len(ordered),
        p50=quantile(ordered, 0.50),
        p90=quantile(ordered, 0.90),
        p99=quantile(ordered, 0.99),
        max=ordered[-1],
    )


def wake_latency_ms(request: RequestRecord) -> float | None:
    """Returns COMPUTE sent to first token received; None: not a wake, or no token came."""
    if request.compute_s is None or request.first_token_s is None:
        return None
    return (request.first_token_s - request.compute_s) * 1e3


def wake_source(request: RequestRecord) -> WakeSource:
    """Returns where the request's KV was found. Any recomputing outweighs any copy."""
    if request.kv is None:
        return WakeSource.UNKNOWN
    # A worker that was started again does not know that it computes something again.
    lost = request.resends > 0 and request.prefilled_tokens > 2 * request.appended_tokens
    if lost or request.kv.recomputed_tokens > 0:
        return WakeSource.RECOMPUTED
    return WakeSource.MOVED if request.kv.loaded_blocks > 0 else WakeSource.RESIDENT


def gaps_ms(request: RequestRecord) -> list[float]:
    """Returns the time before each token after the first; tokens of one message share its gap."""
    gaps: list[float] = []
    previous: float | None = None
    for time_s, tokens in request.deltas:
        if previous is not None:
            gaps.extend([(time_s - previous) * 1e3 / tokens] * tokens)
        previous = time_s
    return gaps


def _tpot_ms(request: RequestRecord) -> float | None:
    if request.first_token_s is None or request.output_tokens < 2:
        return None
    return (request.end_s - request.first_token_s) * 1e3 / (request.output_tokens - 1)


def _latency_ms(request: RequestRecord) -> float:
    return (request.end_s - request.scheduled_s) * 1e3


def latency_problem(info: RunInfo) -> str:
    """Returns why the run's latencies cannot be trusted; empty: they can."""
    late = [lag for lag in info.loop_lag if lag.p99_ms > LAG_LIMIT_MS]
    if late:
        worst = max(late, key=lambda lag: lag.p99_ms)
        return (
            f"event loop of client process {worst.process} was {worst.p99_ms:.1f} ms late at p99, "
            f"limit {LAG_LIMIT_MS:g} ms; the kernel took its core away {worst.preemptions} times"
        )
    return ""


def _wakes(good: Sequence[RequestRecord]) -> dict[str, list[float]]:
    """Returns wake latencies in milliseconds, all and by where the KV was found."""
    found: dict[str, list[float]] = defaultdict(list)
    for request in good:
        latency = wake_latency_ms(request)
        if latency is not None:
            found["wake_latency_ms"].append(latency)
            found[f"wake_{wake_source(request).value}_latency_ms"].append(latency)
    return found


def _distributions(
    good: Sequence[RequestRecord], agents: Sequence[AgentRecord]
) -> dict[str, Distribution]:
    wakes = _wakes(good)
    values: dict[str, Iterable[float]] = {
        "latency_ms": map(_latency_ms, good),
        "reason_latency_ms": (_latency_ms(r) for r in good if r.step == 0),
        "reflect_latency_ms": (_latency_ms(r) for r in good if r.step > 0),
        "wake_latency_ms": wakes["wake_latency_ms"],
        "wake_moved_latency_ms": wakes["wake_moved_latency_ms"],
        "wake_resident_latency_ms": wakes["wake_resident_latency_ms"],
        "wake_recomputed_latency_ms": wakes["wake_recomputed_latency_ms"],
        "ttft_ms": ((r.first_token_s - r.sent_s) * 1e3 for r in good if r.first_token_s),
        "itl_ms": (gap for r in good for gap in gaps_ms(r)),
        "tpot_ms": (tpot for r in good if (tpot := _tpot_ms(r)) is not None),
        "open_latency_ms": ((a.opened_s - a.open_sent_s) * 1e3 for a in agents if a.opened_s),
    }
    return {name: distribution(some) for name, some in values.items()}


_SERVER_COUNTERS = {
    "swap_events": "stores",
    "restore_events": "loads",
    "swap_bytes": "stored_bytes",
    "restore_bytes": "loaded_bytes",
    "resident_hit_blocks": "resident_hit_blocks",
    "evictions": "evictions",
    "sessions_restored": "restores",
    "prefetches": "prefetches",
    "drops": "drops",
    "preemptions": "preemptions",
    "prefilled_tokens": "prefilled_tokens",
    "recomputed_tokens": "recomputed_tokens",
    "prefix_hit_tokens": "prefix_hit_tokens",
}


def increase(values: Iterable[float]) -> float:
    """Returns how far a counter went, given what it showed at several moments.

    A counter that went back belongs to a server that was started again: what it showed then has
    been counted since. What was counted between the last look and the end of the old one is lost.
    """
    total = 0.0
    previous: float | None = None
    for value in values:
        if previous is not None:
            total += value - previous if value >= previous else value
        previous = value
    return total


def server_delta(info: RunInfo, samples: Sequence[StatsRecord], counter: str) -> float | None:
    """Returns how far one of the server's counters went during the run; None: it has none."""
    shown = [info.stats_before, *(sample.stats for sample in samples), info.stats_after]
    values = [stats[counter] for stats in shown if counter in stats]
    if not values:
        return None
    if counter not in info.stats_before:
        values.insert(0, 0.0)
    return increase(values)


def _aggregates(
    info: RunInfo,
    agents: Sequence[AgentRecord],
    requests: Sequence[RequestRecord],
    samples: Sequence[StatsRecord],
    distributions: dict[str, Distribution],
) -> dict[str, float | None]:
    good = [r for r in requests if r.failure is None]
    successes = sum(a.failure is None for a in agents)
    duration = max((r.end_s for r in requests), default=0.0)
    sources = [wake_source(r) for r in good if wake_latency_ms(r) is not None]
    result: dict[str, float | None] = {
        "total_agents": info.config.workload.total_agents,
        "success_count": successes,
        "failed_count": info.config.workload.total_agents - successes,
        "requests_ok": len(good),
        "requests_failed": len(requests) - len(good),
        "refusals": sum(a.refusals for a in agents),
        "resends": sum(r.resends for r in requests),
        "duration_s": duration,
        "throughput_ops_per_sec": len(good) / duration if duration > 0 else None,
        "output_tokens": sum(r.output_tokens for r in requests),
        "output_tokens_per_sec": (
            sum(r.output_tokens for r in requests) / duration if duration > 0 else None
        ),
        "wakes": len(sources),
        "wakes_moved": sources.count(WakeSource.MOVED),
        "wakes_resident": sources.count(WakeSource.RESIDENT),
        "wakes_recomputed": sources.count(WakeSource.RECOMPUTED),
        "peak_live_agents": _peak_live(agents),
    }
    for name, counter in _SERVER_COUNTERS.items():
        result[name] = server_delta(info, samples, counter)
    for name, spread in distributions.items():
        result[f"p50_{name}"] = spread.p50
        result[f"p90_{name}"] = spread.p90
        result[f"p99_{name}"] = spread.p99
    return result


def _peak_live(agents: Sequence[AgentRecord]) -> int:
    """Returns the most sessions open at one time."""
    changes: list[tuple[float, int]] = []
    for agent in agents:
        if agent.opened_s is not None:
            changes.append((agent.opened_s, 1))
            end = agent.closed_s if agent.closed_s is not None else agent.done_s
            changes.append((max(end, agent.opened_s), -1))
    live = peak = 0
    # At one moment, those who leave do so first.
    for _, change in sorted(changes):
        live += change
        peak = max(peak, live)
    return peak


def _agent_results(
    agents: Sequence[AgentRecord], requests: Sequence[RequestRecord]
) -> list[AgentResult]:
    of_agent: dict[int, list[RequestRecord]] = defaultdict(list)
    for request in sorted(requests, key=lambda r: (r.agent, r.step)):
        of_agent[request.agent].append(request)
    results = []
    for agent in sorted(agents, key=lambda a: a.agent):
        good = [r for r in of_agent[agent.agent] if r.failure is None]
        wakes = [w for r in good if (w := wake_latency_ms(r)) is not None]
        results.append(
            AgentResult(
                agent=agent.agent,
                name=agent.name,
                arrival_time_s=agent.scheduled_s,
                reason_latency_ms=next((_latency_ms(r) for r in good if r.step == 0), None),
                wake_latency_ms=max(wakes, default=None),
                wake_latencies_ms=wakes,
                requests=len(good),
                ok=agent.failure is None,
                error=agent.failure,
            )
        )
    return results


def _errors(info: RunInfo, agents: Sequence[AgentRecord]) -> list[ErrorCount]:
    found: dict[str, ErrorCount] = {}
    for agent in agents:
        if agent.failure is not None:
            reason = agent.failure.reason
            seen = found.get(reason, ErrorCount(reason, 0, agent.failure.message))
            found[reason] = msgspec.structs.replace(seen, count=seen.count + 1)
    missing = info.config.workload.total_agents - len(agents)
    if missing > 0:
        found["NO_RECORD"] = ErrorCount("NO_RECORD", missing, "the run ended before the agent did")
    return sorted(found.values(), key=lambda error: -error.count)


def compute(info: RunInfo, records: Sequence[Record]) -> Report:
    """Returns a run's results.

    Args:
        info: What the run was.
        records: Its raw events, in any order.
    """
    agents = [r for r in records if isinstance(r, AgentRecord)]
    requests = [r for r in records if isinstance(r, RequestRecord)]
    samples = [r for r in records if isinstance(r, StatsRecord)]
    good = [r for r in requests if r.failure is None]
    distributions = _distributions(good, agents)
    aggregates = _aggregates(info, agents, requests, samples, distributions)
    problem = latency_problem(info)
    bounds = dict(info.config.expected_results)
    if "success_count" not in bounds:
        bounds = {"success_count": info.config.workload.total_agents, **bounds}
    return Report(
        name=info.name,
        target=info.target,
        server=info.server,
        model=str(info.model.get("model", "")),
        policy=info.policy,
        labels=list(info.labels),
        interrupted=info.interrupted,
        latency_problem=problem,
        aggregates=aggregates,
        distributions=distributions,
        agents=_agent_results(agents, requests),
        errors=_errors(info, agents),
        checks=[
            expectations.check(name, bound, aggregates, problem) for name, bound in bounds.items()
        ],
    )
