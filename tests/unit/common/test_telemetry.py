from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from services.common.config import TelemetryConfig
from services.common.errors import ConfigError
from services.common.telemetry import (
    Telemetry,
    context_from_traceparent,
    record_span,
    setup,
    traceparent_of,
)

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(autouse=True)
def root_logger_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    for handler in root.handlers[:]:
        if handler not in handlers:
            root.removeHandler(handler)
    root.setLevel(level)


@pytest.fixture
def recorded() -> Iterator[tuple[Telemetry, InMemorySpanExporter]]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    telemetry = Telemetry(provider)
    yield telemetry, exporter
    telemetry.shutdown()


def test_without_configuration_nothing_records_and_the_trace_goes_on() -> None:
    telemetry = setup("djinn-worker", TelemetryConfig(), "w-1")
    parent = context_from_traceparent(TRACEPARENT)

    span = telemetry.tracer("m").start_span("queue", context=parent)

    assert not telemetry.recording
    assert not span.is_recording()
    assert traceparent_of(trace.set_span_in_context(span)) == TRACEPARENT
    telemetry.shutdown()


def test_with_a_file_spans_are_in_it_after_shutdown(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    telemetry = setup("djinn-worker", TelemetryConfig(trace_file=path), "w-1")

    assert telemetry.recording
    telemetry.tracer("m").start_span("queue").end()
    telemetry.shutdown()

    [line] = path.read_text().splitlines()
    assert json.loads(line)["resourceSpans"][0]["scopeSpans"][0]["spans"][0]["name"] == "queue"


def test_nothing_is_global(tmp_path: Path) -> None:
    before = trace.get_tracer_provider()

    telemetry = setup("djinn-worker", TelemetryConfig(trace_file=tmp_path / "t"), "w-1")

    assert trace.get_tracer_provider() is before
    telemetry.shutdown()


def test_shutdown_twice_is_once(tmp_path: Path) -> None:
    telemetry = setup("djinn-worker", TelemetryConfig(trace_file=tmp_path / "t"), "w-1")

    telemetry.shutdown()
    telemetry.shutdown()

    assert not telemetry.recording


def test_shutdown_does_not_wait_for_a_collector_that_hangs() -> None:
    released = threading.Event()

    class Hanging(TracerProvider):
        def shutdown(self) -> None:
            released.wait()

    telemetry = Telemetry(Hanging(shutdown_on_exit=False))

    telemetry.shutdown(timeout_s=0.01)

    released.set()


def test_a_log_line_is_plain_with_level_and_name(capsys: pytest.CaptureFixture[str]) -> None:
    setup("djinn-worker", TelemetryConfig(log_level="info"), "w-1")

    logging.getLogger("services.worker").info("took %d", 3)
    logging.getLogger("services.worker").debug("not shown")

    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith(" INFO services.worker: took 3")


def test_setting_logging_up_twice_writes_each_line_once(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    setup("djinn-worker", TelemetryConfig(), "w-1")
    setup("djinn-worker", TelemetryConfig(), "w-1")

    logging.getLogger("services.worker").info("once")

    assert capsys.readouterr().err.count("once") == 1
    # Handlers of others, here pytest's, still get it.
    assert caplog.messages == ["once"]


def test_an_unknown_log_level_is_named_with_what_is_allowed() -> None:
    with pytest.raises(ConfigError, match=r"--log-level loud: must be one of DEBUG, INFO,"):
        setup("djinn-worker", TelemetryConfig(log_level="loud"), "w-1")


def test_a_trace_file_that_cannot_be_written_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"^trace file /nonexistent/t: No such file"):
        setup("djinn-worker", TelemetryConfig(trace_file=Path("/nonexistent/t")), "w-1")


def test_a_span_of_the_past_has_its_times_and_parent(
    recorded: tuple[Telemetry, InMemorySpanExporter],
) -> None:
    telemetry, exporter = recorded

    context = record_span(
        telemetry.tracer("m"),
        "kv.restore",
        context_from_traceparent(TRACEPARENT),
        1000,
        3000,
        {"djinn.bytes": 7},
        {"first_token": 2000},
    )
    record_span(telemetry.tracer("m"), "child", context, 1500, 1400)

    first, child = (_plain(span) for span in exporter.get_finished_spans())
    assert first["times"] == (1000, 3000)
    assert first["trace"] == child["trace"] == 0x0AF7651916CD43DD8448EB211C80319C
    assert first["parent"] == 0xB7AD6B7169203331
    assert first["events"] == {"first_token": 2000}
    assert first["attributes"] == {"djinn.bytes": 7}
    assert child["parent"] == first["id"]
    # Clocks that disagree make no span end before it began.
    assert child["times"] == (1500, 1500)


def _plain(span: Any) -> dict[str, Any]:
    return {
        "id": span.context.span_id,
        "trace": span.context.trace_id,
        "parent": span.parent.span_id,
        "times": (span.start_time, span.end_time),
        "events": {event.name: event.timestamp for event in span.events},
        "attributes": dict(span.attributes),
    }
