"""Wakes out of trace files, drawn as text waterfalls.

Reads OTLP JSON lines: one ``ExportTraceServiceRequest`` per line, as the trace files of Djinn's
processes and an OpenTelemetry collector's file exporter hold them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.text import Text

from loadgen.errors import RunFileError
from loadgen.spans import WAKE, Span, SpanEvent
from loadgen.stages import stages_of

BAR_WIDTH = 40
_STYLES = ("cyan", "green", "magenta", "yellow", "blue")


def read(paths: Iterable[Path]) -> list[Span]:
    """Reads the spans of several files.

    Raises:
        RunFileError: A file cannot be read, or a line is not OTLP JSON; the message has its number.
    """
    spans: dict[tuple[str, str], Span] = {}
    for path in paths:
        try:
            lines = path.read_bytes().split(b"\n")
        except OSError as error:
            raise RunFileError(f"{path}: {error.strerror}") from None
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                found = list(_spans_of(msgspec.json.decode(line)))
            except (msgspec.DecodeError, KeyError, TypeError, ValueError, AttributeError):
                raise RunFileError(f"{path}:{number}: not a line of OTLP JSON") from None
            spans.update({(span.trace_id, span.span_id): span for span in found})
    return list(spans.values())


def _spans_of(request: dict[str, Any]) -> Iterable[Span]:
    for resource_spans in request["resourceSpans"]:
        resource = _attributes(resource_spans.get("resource", {}).get("attributes", ()))
        service = str(resource.get("service.name", "unknown"))
        for scope_spans in resource_spans.get("scopeSpans", ()):
            for span in scope_spans.get("spans", ()):
                yield _span(span, service)


def _span(span: dict[str, Any], service: str) -> Span:
    status = span.get("status", {})
    failed = status.get("code") in {2, "STATUS_CODE_ERROR"}
    events = [
        SpanEvent(event["name"], int(event["timeUnixNano"])) for event in span.get("events", ())
    ]
    return Span(
        trace_id=span["traceId"],
        span_id=span["spanId"],
        parent_id=span.get("parentSpanId", ""),
        name=span["name"],
        service=service,
        start_ns=int(span["startTimeUnixNano"]),
        end_ns=int(span["endTimeUnixNano"]),
        attributes=_attributes(span.get("attributes", ())),
        events=tuple(sorted(events, key=lambda event: event.time_ns)),
        error=(status.get("message") or "failed") if failed else "",
    )


def _attributes(items: Iterable[dict[str, Any]]) -> dict[str, Any]:
    return {item["key"]: _value(item.get("value", {})) for item in items}


def _value(value: dict[str, Any]) -> Any:
    if "intValue" in value:
        return int(value["intValue"])
    if "arrayValue" in value:
        return [_value(entry) for entry in value["arrayValue"].get("values", ())]
    for key in ("stringValue", "doubleValue", "boolValue"):
        if key in value:
            return value[key]
    return None


def slowest_wakes(spans: Sequence[Span], count: int) -> list[list[Span]]:
    """Returns the traces of the slowest wakes, slowest first, each with all its spans."""
    traces: dict[str, list[Span]] = defaultdict(list)
    for span in spans:
        traces[span.trace_id].append(span)
    wakes = sorted(
        (span for span in spans if span.name == WAKE), key=lambda span: -span.duration_ms
    )
    return [traces[wake.trace_id] for wake in wakes[:count]]


def _in_tree_order(spans: Sequence[Span]) -> list[tuple[int, Span]]:
    """Returns spans with their depth: parents before children, earlier siblings first.

    A span whose parent was not recorded stands where a root would.
    """
    known = {span.span_id for span in spans}
    children: dict[str, list[Span]] = defaultdict(list)
    for span in spans:
        children[span.parent_id if span.parent_id in known else ""].append(span)
    ordered: list[tuple[int, Span]] = []

    def visit(parent_id: str, depth: int) -> None:
        for span in sorted(children[parent_id], key=lambda s: (s.start_ns, -s.end_ns)):
            ordered.append((depth, span))
            visit(span.span_id, depth + 1)

    visit("", 0)
    return ordered


def waterfall(spans: Sequence[Span], console: Console) -> None:
    """Prints one trace: a line per span with its service, times and a bar, then the wake's stages.

    The bars' scale is that of the wake; what goes on after it (the rest of the generation) is cut
    off with an arrow.
    """
    rows = _in_tree_order(spans)
    wake = next((span for _, span in rows if span.name == WAKE), rows[0][1])
    begin = min(span.start_ns for span in spans)
    end = wake.end_ns + max(1, (wake.end_ns - begin) // 10)
    agent = wake.attributes.get("gen_ai.conversation.id", "")
    console.print(
        f"{wake.name} {agent} {wake.duration_ms:.1f} ms, trace {wake.trace_id}",
        style="bold",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    styles: dict[str, str] = {}
    names = max(2 * depth + len(span.name) for depth, span in rows)
    services = max(len(span.service) for span in spans)
    for depth, span in rows:
        style = styles.setdefault(span.service, _STYLES[len(styles) % len(_STYLES)])
        line = Text.assemble(
            f"{'  ' * depth + span.name:<{names}}  ",
            (f"{span.service:<{services}}  ", style),
            (_bar(span, begin, end), style),
            f" {(span.start_ns - begin) * 1e-6:8.1f} +{span.duration_ms:8.1f} ms",
        )
        if details := _details(span):
            line.append(f"  {details}", style="dim")
        if span.error:
            line.append(f"  {span.error}", style="red")
        console.print(line, highlight=False, soft_wrap=True)
    if (stages := stages_of(spans)) is not None:
        console.print(str(stages), highlight=False, markup=False, soft_wrap=True)


def _bar(span: Span, begin: int, end: int) -> str:
    """Returns a span as a bar of `BAR_WIDTH` characters, which stand for `begin` to `end`."""
    scale = BAR_WIDTH / (end - begin)

    def place(time_ns: int) -> int:
        return min(BAR_WIDTH - 1, max(0, int((time_ns - begin) * scale)))

    left = place(span.start_ns)
    width = max(1, round((min(span.end_ns, end) - span.start_ns) * scale))
    bar = list((" " * left + "━" * width)[:BAR_WIDTH].ljust(BAR_WIDTH))
    if span.end_ns > end:
        bar[-1] = "→"
    for event in span.events:
        if event.time_ns <= end:
            bar[place(event.time_ns)] = "◆"
    return "".join(bar)


# Attribute, and what to call it in the waterfall; zeros are left out.
_SHOWN = (
    ("djinn.decision", ""),
    ("djinn.decision.reason", "because"),
    ("djinn.kv.bytes", "copied"),
    ("djinn.kv.blocks", "blocks"),
    ("djinn.kv.bytes_per_second", "at"),
    ("djinn.kv.loaded_blocks", "loaded_blocks"),
    ("djinn.kv.resident_blocks", "resident_blocks"),
    ("djinn.kv.recomputed_tokens", "recomputed_tokens"),
    ("djinn.prefilled_tokens", "prefilled_tokens"),
)


def _details(span: Span) -> str:
    shown = []
    for key, name in _SHOWN:
        value = span.attributes.get(key)
        if not value:
            continue
        text = str(value)
        if key.endswith("bytes_per_second"):
            text = f"{float(value) / 1e9:.2f} GB/s"
        elif key.endswith("bytes"):
            text = f"{float(value) / 1e6:.1f} MB"
        shown.append(f"{name} {text}".strip())
    shown += [
        f"◆ {event.name} at +{(event.time_ns - span.start_ns) * 1e-6:.1f} ms"
        for event in span.events
    ]
    return ", ".join(shown)


def files_of(run: Path, also: Sequence[Path] = ()) -> list[Path]:
    """Returns the trace files of a run's folder (or `run` itself, if it is a file), and others.

    Raises:
        RunFileError: There are none.
    """
    found = [run] if run.is_file() else sorted(run.glob("traces*.jsonl"))
    if not found and not also:
        raise RunFileError(f"{run}: no trace files (traces*.jsonl) there; run with --trace")
    return [*found, *also]
