from __future__ import annotations

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from services.common.errors import WrongStateError
from services.common.telemetry import Telemetry, context_from_traceparent
from services.worker import messages
from services.worker.front.generation import Generation
from services.worker.front.session_log import SessionLog
from services.worker.front.spans import SpanRecorder
from services.worker.front.text_stream import TextStream
from tests.support.stand_ins import command_done, finished, started, submit

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def recorder(exporter: InMemorySpanExporter) -> SpanRecorder:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return SpanRecorder(Telemetry(provider), "model")


def by_name(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in exporter.get_finished_spans()}


def generation(kv: messages.KvSource | None = None) -> Generation:
    done = Generation(submit(), SessionLog(), TextStream(None), lambda message: None)
    done.on_started(started(kv=kv or messages.KvSource()))
    times = done.times
    times.received_ns, times.collected_ns, times.ended_ns = 1_000, 6_000, 9_000
    times.first_token_ns, times.first_sent_ns = 7_000, 7_500
    return done


def test_a_request_is_a_span_with_its_parts(
    recorder: SpanRecorder, exporter: InMemorySpanExporter
) -> None:
    done = generation()
    done.on_finished(finished(5))
    done.times.ended_ns = 9_000
    recorder.generation(done, context_from_traceparent(PARENT))
    spans = by_name(exporter)
    assert set(spans) == {"generate", "queue", "prefill"}
    root = spans["generate"]
    assert root.parent is not None
    assert trace.format_span_id(root.parent.span_id) == PARENT.split("-")[2]
    assert (root.start_time, root.end_time) == (1_000, 9_000)
    assert [(event.name, event.timestamp) for event in root.events] == [
        ("first_token", 7_000),
        ("first_token_sent", 7_500),
    ]
    assert root.attributes is not None
    assert root.attributes["gen_ai.request.model"] == "model"
    assert root.attributes["gen_ai.conversation.id"] == "s"
    assert root.attributes["gen_ai.response.finish_reasons"] == ("length",)
    for name, times in (("queue", (1_000, 3_000)), ("prefill", (3_000, 6_000))):
        span = spans[name]
        assert span.parent is not None
        assert root.context is not None
        assert span.parent.span_id == root.context.span_id
        assert (span.start_time, span.end_time) == times


@pytest.mark.parametrize(("load_start_ns", "own"), [(2_000, True), (500, False)])
def test_a_restore_of_the_requests_own_has_a_span(
    recorder: SpanRecorder, exporter: InMemorySpanExporter, load_start_ns: int, own: bool
) -> None:
    kv = messages.KvSource(
        loaded_blocks=3, loaded_bytes=1_000, resident_blocks=2,
        load_start_ns=load_start_ns, load_end_ns=2_500,
    )  # fmt: skip
    recorder.generation(generation(kv), None)
    spans = by_name(exporter)
    assert ("kv.restore" in spans) is own
    if own:
        attributes = spans["kv.restore"].attributes
        assert attributes is not None
        assert attributes["djinn.kv.bytes"] == 1_000
        assert attributes["djinn.kv.resident_blocks"] == 2
        assert attributes["djinn.kv.bytes_per_second"] == pytest.approx(2e9)


def test_a_request_that_failed_early_is_a_span_with_its_error(
    recorder: SpanRecorder, exporter: InMemorySpanExporter
) -> None:
    failed = Generation(submit(), SessionLog(), TextStream(None), lambda message: None)
    failed.fail(WrongStateError("no"))
    recorder.generation(failed, None)
    spans = by_name(exporter)
    assert set(spans) == {"generate"}
    assert spans["generate"].attributes is not None
    assert spans["generate"].attributes["error.type"] == "WRONG_STATE"


@pytest.mark.parametrize(
    ("action", "name"),
    [
        (messages.Evict(), "kv.evict"),
        (messages.Restore(), "kv.restore"),
        (messages.Prefetch(), "kv.prefetch"),
        (messages.Drop(), "kv.drop"),
        (messages.SetHint(), None),
        (messages.Open(), None),
    ],
)
def test_a_command_that_moves_kv_is_a_span_under_its_cause(
    recorder: SpanRecorder,
    exporter: InMemorySpanExporter,
    action: messages.Action,
    name: str | None,
) -> None:
    command = messages.Command("c", "s", action, received_ns=100)
    done = command_done(
        moved_bytes=50, copy_start_ns=200, copy_end_ns=300, done_ns=400, taken_ns=150
    )
    recorder.command(command, PARENT, done)
    spans = by_name(exporter)
    assert set(spans) == ({name} if name else set())
    for span in spans.values():
        assert span.parent is not None
        assert trace.format_trace_id(span.parent.trace_id) == PARENT.split("-")[1]
        assert (span.start_time, span.end_time) == (100, 400)
        assert [(event.name, event.timestamp) for event in span.events] == [("taken", 150)]
        assert span.attributes is not None
        assert span.attributes["djinn.kv.bytes_per_second"] == pytest.approx(5e8)


def test_a_command_that_the_front_refused_was_never_taken(
    recorder: SpanRecorder, exporter: InMemorySpanExporter
) -> None:
    command = messages.Command("c", "s", messages.Restore(), received_ns=100)
    recorder.command(command, PARENT, command_done(done_ns=400))
    assert by_name(exporter)["kv.restore"].events == ()


def test_nothing_is_recorded_if_nobody_listens() -> None:
    recorder = SpanRecorder(Telemetry(), "model")
    assert recorder.current() is None
    recorder.generation(generation(), None)
