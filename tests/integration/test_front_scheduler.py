"""A front and its control stream, to a scheduler that is the test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from djinn.v1 import control_service_pb2 as control_pb
from services.common.telemetry import Telemetry
from tests.support import fake_engine
from tests.support.fake_scheduler import FakeScheduler, WorkerStream
from tests.support.front import CONFIG, Running, request, serving, tokens_of

EVICT: dict[str, Any] = {"evict": control_pb.EvictAction()}
TRACE = "0af7651916cd43dd8448eb211c80319c"
SPAN = "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{SPAN}-01"


@dataclass
class Scheduled:
    """A front with a scheduler that is the test, and the spans that it recorded."""

    worker: Running
    scheduler: FakeScheduler
    stream: WorkerStream
    spans: InMemorySpanExporter


@pytest.fixture
async def scheduled() -> AsyncIterator[Scheduled]:
    spans = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    scheduler = FakeScheduler()
    async with scheduler.serving() as port:
        config = replace(CONFIG, scheduler=f"127.0.0.1:{port}", advertised_endpoint="gpu-1:7")
        async with serving(config, Telemetry(provider)) as worker:
            stream = await scheduler.streams.get()
            stream.welcome(interval_s=0.02)
            yield Scheduled(worker, scheduler, stream, spans)


async def test_a_session_lives_by_commands_events_and_reports(scheduled: Scheduled) -> None:
    worker, stream = scheduled.worker, scheduled.stream
    hello = await stream.next("hello")
    assert hello.advertised_endpoint == "gpu-1:7"
    assert hello.capacity.device_blocks == 100
    stream.command("open", scheduler_record=b"r", open=control_pb.OpenAction())
    assert (await stream.next("result")).status.code == 0
    # Known by command, so no token is needed.
    await worker.generate(token=False, append_token_ids=[1, 2], max_tokens=2)
    event = await stream.next("session_event")
    assert event.type == control_pb.SESSION_EVENT_TYPE_GENERATE_STARTED
    event = await stream.next("session_event")
    assert event.type == control_pb.SESSION_EVENT_TYPE_GENERATE_FINISHED
    assert (event.session.context_length, event.session.scheduler_record) == (4, b"r")
    stream.command("evict", expected_generation=event.session.generation, **EVICT)
    result = await stream.next("result")
    assert (result.moved_bytes, result.resident_blocks) == (4096, 1)
    assert not result.kv.resident
    stream.command("stale", expected_generation=1, **EVICT)
    assert (await stream.next("result")).status.code == 9
    while (await stream.next("memory_report")).sessions != 1:
        pass  # one from before it was opened
    stream.command("close", close=control_pb.CloseAction())
    assert (await stream.next("result")).status.code == 0
    error = await worker.error_of(token=False, append_token_ids=[1])
    assert error.reason == "SESSION_UNKNOWN"


async def test_a_call_and_a_command_continue_their_traces(scheduled: Scheduled) -> None:
    stream, stub = scheduled.stream, scheduled.worker.stub
    call = stub.Generate(
        request(append_token_ids=[1], max_tokens=2), metadata=(("traceparent", TRACEPARENT),)
    )
    assert len([response async for response in call]) >= 3
    stream.command("evict", traceparent=TRACEPARENT, **EVICT)
    await stream.next("result")
    spans = {span.name: span for span in scheduled.spans.get_finished_spans()}
    assert set(spans) == {"generate", "queue", "prefill", "kv.restore", "kv.evict"}
    for span in spans.values():
        assert trace.format_trace_id(span.context.trace_id) == TRACE
    for name in ("generate", "kv.evict"):
        parent = spans[name].parent
        assert parent is not None
        assert trace.format_span_id(parent.span_id) == SPAN
    assert [event.name for event in spans["generate"].events] == ["first_token"]


async def test_the_worker_serves_while_its_scheduler_is_gone(scheduled: Scheduled) -> None:
    scheduled.stream.end()
    assert tokens_of(await scheduled.worker.generate(append_token_ids=[1], max_tokens=2)) == [1, 1]
    again = await scheduled.scheduler.streams.get()
    hello = await again.next("hello")
    assert [session.session_id for session in hello.snapshot] in (["s"], [])


async def test_draining_tells_the_scheduler(scheduled: Scheduled) -> None:
    call = scheduled.worker.stub.Generate(request(append_token_ids=[fake_engine.HANG]))
    await call.read()
    scheduled.worker.stop.set()
    again = await scheduled.scheduler.streams.get()
    hello = await again.next("hello")
    assert hello.draining
    assert [session.generating for session in hello.snapshot] == [True]
    call.cancel()
    assert await scheduled.worker.task == 0


async def test_a_worker_whose_scheduler_was_never_there_serves() -> None:
    async with serving(replace(CONFIG, scheduler="127.0.0.1:1")) as worker:
        assert tokens_of(await worker.generate(append_token_ids=[1], max_tokens=2)) == [1, 1]
