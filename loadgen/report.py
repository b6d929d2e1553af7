"""A run's report as a table for people and as JSON for programs."""

from __future__ import annotations

from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from loadgen import metrics
from loadgen.expectations import Check, Verdict
from loadgen.metrics import Distribution, Report
from loadgen.record import REPORT_FILE, read_requests, read_run

_LATENCY_ROWS = (
    ("latency_ms", "request, scheduled to end"),
    ("reason_latency_ms", "  Reason"),
    ("reflect_latency_ms", "  Reflect"),
    ("wake_latency_ms", "wake, COMPUTE to first token"),
    ("wake_moved_latency_ms", "  KV copied from the host"),
    ("wake_resident_latency_ms", "  KV still on the device"),
    ("wake_recomputed_latency_ms", "  KV recomputed"),
    ("wake_unknown_latency_ms", "  server does not say"),
    ("open_latency_ms", "OpenSession"),
    ("ttft_ms", "TTFT, Generate to first token"),
    ("itl_ms", "ITL, gap before each token"),
    ("tpot_ms", "TPOT, mean gap of a request"),
)
_VERDICT_STYLES = {Verdict.PASS: "green", Verdict.FAIL: "bold red", Verdict.VOID: "yellow"}


def load(run: Path) -> Report:
    """Computes the report of a run's folder.

    Raises:
        RunFileError: The folder is not a run's, or is broken.
    """
    return metrics.compute(read_run(run), read_requests(run))


def to_json(report: Report) -> bytes:
    """Returns a report as JSON."""
    data = msgspec.to_builtins(report)
    data["passed"] = report.passed
    return msgspec.json.format(msgspec.json.encode(data), indent=2) + b"\n"


def save(run: Path, report: Report) -> Path:
    """Writes a report into its run's folder and returns the file."""
    path = run / REPORT_FILE
    path.write_bytes(to_json(report))
    return path


def show(report: Report, console: Console) -> None:
    """Prints a report."""
    title = f"{report.name}: {report.model} on {report.target} at {report.server}"
    if report.policy:
        title += f", policy {report.policy}"
    console.print(title, style="bold", highlight=False, markup=False)
    if report.labels:
        console.print(f"labels: {', '.join(report.labels)}", style="yellow", markup=False)
    if report.interrupted:
        console.print("the run was stopped before its end", style="yellow")
    _show_totals(report, console)
    _show_latencies(report, console)
    _show_errors(report, console)
    _show_checks(report.checks, report.latency_problem, console)


def _show_totals(report: Report, console: Console) -> None:
    values = report.aggregates

    def count(name: str, what: str) -> str:
        return f"{_count(values, name)} {what}"

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    rows: dict[str, tuple[str, ...]] = {
        "agents": (
            count("success_count", f"of {_count(values, 'total_agents')} succeeded"),
            f"at most {count('peak_live_agents', 'live at once')}",
            count("refusals", "times told to come again later"),
        ),
        "requests": (
            count("requests_ok", "ok"),
            count("requests_failed", "failed"),
            count("resends", "sent again"),
        ),
        "throughput": (
            f"{_number(values['throughput_ops_per_sec'])} requests/s",
            f"{_number(values['output_tokens_per_sec'])} tokens/s",
            f"over {_number(values['duration_s'])} s",
        ),
        "wakes": (
            count("wakes", "in all"),
            count("wakes_moved", "moved"),
            count("wakes_resident", "resident"),
            count("wakes_recomputed", "recomputed"),
        ),
        "swap_events": (count("swap_events", "stores"), _size(values["swap_bytes"])),
        "restore_events": (
            count("restore_events", "loads"),
            _size(values["restore_bytes"]),
            count("resident_hit_blocks", "blocks found still resident"),
        ),
        "sessions": (
            count("evictions", "evicted"),
            count("sessions_restored", "restored"),
            count("prefetches", "prefetched"),
            count("drops", "dropped"),
            count("preemptions", "preempted"),
        ),
        "tokens": (
            count("prefilled_tokens", "prefilled"),
            count("recomputed_tokens", "of them again"),
            count("prefix_hit_tokens", "found in a shared prefix"),
            count("output_tokens", "generated"),
        ),
    }
    for name, parts in rows.items():
        table.add_row(name, ", ".join(parts))
    console.print(table, highlight=False)


def _show_latencies(report: Report, console: Console) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), title=None)
    table.add_column("milliseconds", style="cyan", no_wrap=True)
    for name in ("p50", "p90", "p99", "max", "count"):
        table.add_column(name, justify="right")
    for name, text in _LATENCY_ROWS:
        spread = report.distributions.get(name, Distribution())
        if spread.count == 0:
            continue
        table.add_row(
            text,
            *(_milliseconds(v) for v in (spread.p50, spread.p90, spread.p99, spread.max)),
            f"{spread.count:,}",
        )
    console.print()
    console.print(table, highlight=False)
    if report.latency_problem:
        console.print(
            f"latencies are not valid: {report.latency_problem}",
            style="yellow",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def _show_errors(report: Report, console: Console) -> None:
    for error in report.errors:
        console.print(
            f"{error.count} agents failed: {error.reason}: {error.message}",
            style="red",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def _show_checks(checks: list[Check], said: str, console: Console) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("expected", style="cyan", no_wrap=True)
    table.add_column("bound", justify="right")
    table.add_column("measured", justify="right")
    table.add_column("verdict")
    for check in checks:
        verdict = check.verdict.value
        if check.reason and check.reason not in said:
            verdict += f": {check.reason}"
        table.add_row(
            check.name,
            f"{check.relation} {_number(check.bound)}",
            _number(check.value),
            f"[{_VERDICT_STYLES[check.verdict]}]{verdict}[/]",
        )
    console.print()
    console.print(table, highlight=False)


def _count(values: dict[str, float | None], name: str) -> str:
    value = values.get(name)
    return "?" if value is None else f"{round(value):,}"


def _number(value: float | None) -> str:
    if value is None:
        return "?"
    if float(value).is_integer():
        return f"{round(value):,}"
    return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3g}"


def _milliseconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def _size(value: float | None) -> str:
    if value is None:
        return "?"
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.1f} GB"
