from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

import djinn_client as djinn
from djinn_client.testing import FakeServer


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def provider(exporter: InMemorySpanExporter) -> TracerProvider:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return provider


@pytest.fixture
async def fake() -> AsyncIterator[FakeServer]:
    async with FakeServer() as server:
        yield server


@pytest.fixture
async def agent(fake: FakeServer, provider: TracerProvider) -> AsyncIterator[djinn.Session]:
    async with (
        await djinn.connect(fake.endpoint, tracer_provider=provider) as client,
        client.session(name="researcher", session_id="s1") as session,
    ):
        yield session


def _by_name(exporter: InMemorySpanExporter, name: str) -> list[ReadableSpan]:
    return [span for span in exporter.get_finished_spans() if span.name == name]


def _traceparent(span: ReadableSpan) -> str:
    context = span.get_span_context()
    assert context is not None
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"


async def test_one_wake_is_one_trace(
    fake: FakeServer, agent: djinn.Session, exporter: InMemorySpanExporter
) -> None:
    async with agent.tool("search"):
        pass
    await agent.generate_text("x", max_tokens=2, temperature=0.5, top_k=3, top_p=0.5)
    await fake.wait_until(lambda: len(fake.signals) == 2)
    await agent.signal_phase("IO_WAIT")
    (wake,) = _by_name(exporter, "agent.wake")
    (generate,) = _by_name(exporter, "generate")
    to_sleep, to_wake, _ = _by_name(exporter, "signal_phase")
    assert wake.parent is None
    assert to_sleep.parent is None
    wake_context = wake.get_span_context()
    assert wake_context is not None
    for child in (generate, to_wake):
        assert child.parent is not None
        assert child.parent.span_id == wake_context.span_id
        context = child.get_span_context()
        assert context is not None
        assert context.trace_id == wake_context.trace_id
    assert fake.signals[1].traceparent == _traceparent(to_wake)
    assert fake.requests[0].traceparent == _traceparent(generate)
    assert [event.name for event in generate.events] == ["first_token"]
    assert wake.start_time is not None
    assert wake.end_time is not None
    assert generate.end_time is not None
    assert wake.start_time < wake.end_time < generate.end_time
    assert wake.attributes is not None
    assert wake.attributes["djinn.wake.latency"] == agent.last_wake_latency_s


async def test_attributes_have_the_names_of_the_conventions(
    agent: djinn.Session, exporter: InMemorySpanExporter
) -> None:
    await agent.chat("hello", max_tokens=2, temperature=0.5, top_k=3, top_p=0.5)
    (generate,) = _by_name(exporter, "generate")
    attributes = dict(generate.attributes or {})
    assert attributes.pop("djinn.request.id")
    assert attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.conversation.id": "s1",
        "gen_ai.request.max_tokens": 2,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_k": 3,
        "gen_ai.request.top_p": 0.5,
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.input_tokens": 27,
        "gen_ai.usage.output_tokens": 2,
        "djinn.usage.cached_tokens": 0,
        "djinn.usage.prefilled_tokens": 27,
    }


async def test_the_callers_span_is_the_parent(
    fake: FakeServer,
    agent: djinn.Session,
    provider: TracerProvider,
    exporter: InMemorySpanExporter,
) -> None:
    with provider.get_tracer("test").start_as_current_span("task") as task:
        await agent.signal_phase("IO_WAIT")
        agent.signal_phase("COMPUTE")
        await agent.generate_text("x", max_tokens=1)
    await fake.wait_until(lambda: len(fake.signals) == 2)
    (wake,) = _by_name(exporter, "agent.wake")
    assert wake.parent is not None
    assert wake.parent.span_id == task.get_span_context().span_id


async def test_a_failure_is_marked(
    fake: FakeServer, agent: djinn.Session, exporter: InMemorySpanExporter
) -> None:
    await agent.signal_phase("IO_WAIT")
    agent.signal_phase("COMPUTE")
    with pytest.raises(djinn.InvalidRequestError):
        await agent.generate_text("x", max_tokens=0)
    (generate,) = _by_name(exporter, "generate")
    assert generate.status.status_code is StatusCode.ERROR
    assert generate.attributes is not None
    assert generate.attributes["error.type"] == "INVALID_REQUEST"
    assert len(_by_name(exporter, "agent.wake")) == 1
    fake.fail("SignalPhase", "SESSION_CLOSED")
    with pytest.raises(djinn.SessionClosedError):
        await agent.signal_phase("IO_WAIT")
    refused = _by_name(exporter, "signal_phase")[-1]
    assert refused.status.status_code is StatusCode.ERROR


async def test_a_cancelled_and_a_resumed_generation_are_marked(
    fake: FakeServer, agent: djinn.Session, exporter: InMemorySpanExporter
) -> None:
    async for _ in agent.generate("x"):
        break
    fake.fail("Generate", "ENGINE_LOST")
    await agent.generate_text("y", max_tokens=1)
    cancelled, resumed = _by_name(exporter, "generate")
    assert cancelled.attributes is not None
    assert cancelled.attributes["djinn.cancelled"] is True
    assert [event.name for event in resumed.events] == ["resume", "first_token"]


async def test_a_wake_that_nobody_uses_ends(
    agent: djinn.Session, exporter: InMemorySpanExporter
) -> None:
    await agent.signal_phase("IO_WAIT")
    agent.signal_phase("COMPUTE")
    await agent.signal_phase("IO_WAIT")
    (wake,) = _by_name(exporter, "agent.wake")
    assert wake.attributes is not None
    assert wake.attributes["djinn.wake.unused"] is True


async def test_without_an_sdk_nothing_is_sent_along(fake: FakeServer) -> None:
    async with await djinn.connect(fake.endpoint) as client, client.session() as agent:
        await agent.generate_text("x", max_tokens=1)
        await agent.signal_phase("IO_WAIT")
    assert fake.requests[0].traceparent == ""
    assert fake.signals[0].traceparent == ""
