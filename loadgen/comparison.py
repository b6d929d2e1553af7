"""Several runs of one workload side by side: a table with ratios to the first."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
from rich.console import Console
from rich.table import Table

from loadgen import metrics
from loadgen.metrics import Report
from loadgen.record import Record, RequestRecord, RunInfo

NOT_AVAILABLE = "n/a"


class SystemResult(msgspec.Struct, frozen=True):
    """One system's run.

    Attributes:
        name: What the system is called.
        run: Its run's folder, relative to the comparison's.
        target: What it was driven as.
        model: What it served.
        policy: Its scheduling policy; empty: unknown.
        interrupted: The run was stopped before its end.
        latency_problem: Why its latencies cannot be trusted; empty: they can.
        values: Each row's value; None: the system does not tell, or has no such thing.
    """

    name: str
    run: str
    target: str
    model: str
    policy: str
    interrupted: bool
    latency_problem: str
    values: dict[str, float | None]


class Comparison(msgspec.Struct, frozen=True):
    """The same workload on several systems.

    Attributes:
        workload: The workload's name.
        seed: Its seed.
        agents: Its population.
        systems: Each system's run; ratios are to the first.
    """

    workload: str
    seed: int
    agents: int
    systems: tuple[SystemResult, ...]


class Row(msgspec.Struct, frozen=True):
    """One row of the table.

    Attributes:
        name: Of the value in the JSON file; that of an aggregate of `metrics.compute`, where it has
            one of that meaning.
        text: In the table.
        show: Writes a value.
    """

    name: str
    text: str
    show: Callable[[float], str]


def _milliseconds(value: float) -> str:
    return f"{value:,.1f} ms" if value < 1e3 else f"{value:,.0f} ms"


def _count(value: float) -> str:
    return f"{round(value):,}"


def _rate(value: float) -> str:
    return f"{value:.3g}"


def _bytes(value: float) -> str:
    return f"{value / 1e9:,.2f} GB" if value >= 1e9 else f"{value / 1e6:,.1f} MB"


ROWS = (
    Row("p50_wake_latency_ms", "wake p50", _milliseconds),
    Row("p99_wake_latency_ms", "wake p99", _milliseconds),
    Row("p50_wake_moved_latency_ms", "  KV copied from the host, p50", _milliseconds),
    Row("p99_wake_moved_latency_ms", "  KV copied from the host, p99", _milliseconds),
    Row("p50_wake_resident_latency_ms", "  KV still on the device, p50", _milliseconds),
    Row("p99_wake_resident_latency_ms", "  KV still on the device, p99", _milliseconds),
    Row("p50_latency_ms", "request p50", _milliseconds),
    Row("p99_latency_ms", "request p99", _milliseconds),
    Row("p99_itl_ms", "ITL p99", _milliseconds),
    Row("throughput_ops_per_sec", "requests/s", _rate),
    Row("duration_s", "duration", lambda value: f"{value:,.1f} s"),
    Row("success_count", "agents that succeeded", _count),
    Row("peak_live_agents", "most live at once", _count),
    Row("swap_bytes", "stored to the host", _bytes),
    Row("restore_bytes", "loaded from the host", _bytes),
    Row("prefilled_tokens", "tokens prefilled", _count),
    Row("recomputed_tokens", "  of them again", _count),
)


def result(
    name: str, folder: str, info: RunInfo, records: Sequence[Record], report: Report
) -> SystemResult:
    """Returns one system's column.

    Args:
        name: The system's name.
        folder: Its run's folder, as `SystemResult.run`.
        info: The run's description.
        records: Its raw events.
        report: Its report.
    """
    values = {row.name: report.aggregates.get(row.name) for row in ROWS}
    requests = [r for r in records if isinstance(r, RequestRecord) and r.failure is None]
    if values["prefilled_tokens"] is None:
        values["prefilled_tokens"] = prefilled_tokens(requests)
    if values["recomputed_tokens"] is None:
        values["recomputed_tokens"] = recomputed_tokens(requests)
    return SystemResult(
        name=name,
        run=folder,
        target=info.target,
        model=report.model,
        policy=report.policy,
        interrupted=report.interrupted,
        latency_problem=metrics.latency_problem(info),
        values=values,
    )


def prefilled_tokens(requests: Sequence[RequestRecord]) -> float | None:
    """Returns how many tokens were prefilled; None: the server does not say of every request."""
    if not requests or not all(r.prefilled_tokens for r in requests):
        return None
    return sum(r.prefilled_tokens for r in requests)


def recomputed_tokens(requests: Sequence[RequestRecord]) -> float | None:
    """Returns how many tokens were prefilled whose KV had been there before.

    A request after the first must prefill what it appends, and the last token of the one before,
    which was generated and not yet run through the model. All beyond that is done again.
    """
    if prefilled_tokens(requests) is None:
        return None
    return sum(max(0, r.prefilled_tokens - r.appended_tokens - 1) for r in requests if r.step > 0)


def ratio(comparison: Comparison, name: str, system: SystemResult) -> float | None:
    """Returns a system's value over the first system's; None: there is no such number."""
    base, value = comparison.systems[0].values[name], system.values[name]
    return None if not base or value is None else value / base


def to_json(comparison: Comparison) -> bytes:
    """Returns a comparison as JSON, ratios included."""
    data = msgspec.to_builtins(comparison)
    for entry, system in zip(data["systems"], comparison.systems, strict=True):
        entry["ratios"] = {row.name: ratio(comparison, row.name, system) for row in ROWS}
    return msgspec.json.format(msgspec.json.encode(data), indent=2) + b"\n"


def show(comparison: Comparison, console: Console) -> None:
    """Prints a comparison."""
    console.print(
        f"{comparison.workload}: {comparison.agents} agents, seed {comparison.seed}",
        style="bold",
        highlight=False,
        markup=False,
    )
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("", style="cyan", no_wrap=True)
    for number, system in enumerate(comparison.systems):
        table.add_column(system.name, justify="right")
        if number:
            table.add_column("ratio", justify="right", style="dim")
    for row in ROWS:
        cells = []
        for number, system in enumerate(comparison.systems):
            value = system.values[row.name]
            cells.append(NOT_AVAILABLE if value is None else row.show(value))
            if number:
                factor = ratio(comparison, row.name, system)
                cells.append("" if factor is None else f"{factor:.3g} ×")
        table.add_row(row.text, *cells)
    console.print(table, highlight=False)
    for system in comparison.systems:
        for problem in _problems(system):
            console.print(
                f"{system.name}: {problem}", style="yellow", highlight=False, soft_wrap=True
            )


def _problems(system: SystemResult) -> list[str]:
    found = []
    if system.interrupted:
        found.append("the run was stopped before its end")
    if system.latency_problem:
        found.append(f"latencies are not valid: {system.latency_problem}")
    return found
