"""Spans across the scheduler, and what it tells Prometheus and the seed's health check."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from djinn.v1 import agent_service_pb2 as agent_pb
from services.common.telemetry import Telemetry
from tests.support.scheduler_system import COMPUTE, CONFIG, IO_WAIT

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"

# The health check as the seed has it, to be run as it is.
SEED_CHECK = """
import json, sys
d = json.load(sys.stdin)
ss = d.get('semantic_scheduler', {})
sw = ss.get('swap_pool', {})
print(f'Server OK: swaps={sw.get(\"swaps_performed\", 0)}, status={d.get(\"status\", \"unknown\")}')
"""


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    yield exporter
    exporter.shutdown()


@pytest.fixture
def telemetry(spans) -> Telemetry:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    return Telemetry(provider)


def named(spans: InMemorySpanExporter, name: str) -> list[Any]:
    return [span for span in spans.get_finished_spans() if span.name == name]


def traceparent(span: Any) -> str:
    return f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}-01"


async def fetch(url: str) -> bytes:
    def get() -> bytes:
        with urllib.request.urlopen(url) as response:
            return response.read()

    return await asyncio.to_thread(get)


async def test_one_trace_goes_from_the_client_through_to_the_command(systems, spans, telemetry):
    system = await systems.start(telemetry=telemetry)
    worker = await systems.worker(system)
    await system.open("a")
    await worker.expect("open")
    worker.generate("a")
    await system.until(lambda session: session.context_length == 50)
    spans.clear()
    await system.agents.SignalPhase(
        agent_pb.SignalPhaseRequest(session_id="a", phase=COMPUTE, sequence=1),
        metadata=(("traceparent", PARENT),),
    )
    command = await worker.expect("restore")
    (signal,) = named(spans, "signal_phase")
    (decide,) = named(spans, "policy.decide")
    assert f"{signal.context.trace_id:032x}" == TRACE
    assert f"{signal.parent.span_id:016x}" == "b7ad6b7169203331"
    assert decide.parent.span_id == signal.context.span_id
    assert command.traceparent == traceparent(decide)
    assert signal.attributes["gen_ai.conversation.id"] == "a"
    assert signal.attributes["djinn.phase"] == "COMPUTE"
    assert signal.attributes["djinn.signal.ignored"] is False
    assert decide.attributes["djinn.policy"] == "semantic"
    assert decide.attributes["djinn.decision"] == "restore"
    assert decide.attributes["djinn.decision.reason"] == "wakes"
    assert decide.attributes["djinn.worker.id"] == "worker-0"


async def test_each_signal_of_a_stream_has_a_trace_of_its_own(systems, spans, telemetry):
    system = await systems.start(telemetry=telemetry)
    await systems.worker(system)
    await system.open("a")
    spans.clear()
    other = PARENT.replace(TRACE, "1" * 32)
    requests = [
        agent_pb.StreamPhasesRequest(
            signal=agent_pb.SignalPhaseRequest(session_id="a", phase=IO_WAIT, sequence=number),
            traceparent=told,
        )
        for number, told in enumerate((PARENT, other, "", "nonsense"), start=1)
    ]
    async for _ in system.agents.StreamPhases(iter(requests)):
        pass
    traces = [f"{span.context.trace_id:032x}" for span in named(spans, "signal_phase")]
    assert traces[:2] == [TRACE, "1" * 32]
    assert len(set(traces)) == 4


async def test_a_refused_signal_is_told_in_its_span(systems, spans, telemetry):
    system = await systems.start(telemetry=telemetry)
    request = agent_pb.StreamPhasesRequest(
        signal=agent_pb.SignalPhaseRequest(session_id="nobody", phase=COMPUTE, sequence=1)
    )
    async for _ in system.agents.StreamPhases(iter([request])):
        pass
    (signal,) = named(spans, "signal_phase")
    assert not signal.status.is_ok
    assert signal.attributes["error.type"] == "SESSION_UNKNOWN"


async def test_without_a_recorder_the_clients_context_still_reaches_the_worker(system, worker):
    await system.open("a")
    await worker.expect("open")
    worker.generate("a")
    await system.until(lambda session: session.context_length == 50)
    await system.agents.SignalPhase(
        agent_pb.SignalPhaseRequest(session_id="a", phase=COMPUTE, sequence=1),
        metadata=(("traceparent", PARENT),),
    )
    assert (await worker.expect("restore")).traceparent == PARENT


async def test_the_seeds_health_check_works_as_it_is(system, worker, opened):
    await system.signal(IO_WAIT, 1)
    await worker.expect("evict")
    worker.report()
    url = f"http://{system.scheduler.metrics.address}/metrics/vmu"
    body = await fetch(url)
    while json.loads(body)["semantic_scheduler"]["swap_pool"]["swaps_performed"] == 0:
        body = await fetch(url)
    check = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", SEED_CHECK],
        input=body,
        capture_output=True,
        check=True,
    )
    assert check.stdout.decode().strip() == "Server OK: swaps=1, status=ok"
    told = json.loads(body)
    scheduler = told["semantic_scheduler"]
    assert scheduler["enabled"] is True
    assert scheduler["policy"] == "semantic"
    assert scheduler["sessions"] == {"OPEN": 0, "COMPUTE": 0, "IO_WAIT": 1}
    assert scheduler["evictions"] == 1
    assert scheduler["swap_pool"]["bytes_swapped"] == 4096
    assert scheduler["swap_pool"]["pool_bytes_total"] == 400 * 1024
    assert scheduler["swap_pool"]["pool_bytes_used"] == 4096
    assert [entry["worker_id"] for entry in told["workers"]] == ["worker-0"]


async def test_without_workers_the_health_check_says_so(systems):
    system = await systems.start(replace(CONFIG, policy="reactive-lru"))
    told = json.loads(await fetch(f"http://{system.scheduler.metrics.address}/metrics/vmu"))
    assert told["status"] == "no workers"
    assert told["semantic_scheduler"]["enabled"] is False


async def test_prometheus_is_told_of_sessions_signals_and_commands(system, worker, opened):
    await system.signal(IO_WAIT, 1)
    await worker.expect("evict")
    await system.signal(IO_WAIT, 1)
    await system.until(lambda session: not session.kv.resident)
    url = f"http://{system.scheduler.metrics.address}/metrics"
    lines = (await fetch(url)).decode().splitlines()
    for line in (
        'djinn_scheduler_sessions{phase="IO_WAIT"} 1.0',
        'djinn_scheduler_signals_total{outcome="applied",phase="IO_WAIT"} 1.0',
        'djinn_scheduler_signals_total{outcome="ignored",phase="IO_WAIT"} 1.0',
        'djinn_scheduler_commands_sent_total{action="evict"} 1.0',
        'djinn_scheduler_command_results_total{code="OK"} 2.0',
        'djinn_scheduler_signal_to_command_seconds_count{action="evict"} 1.0',
        "djinn_scheduler_commands_in_flight 0.0",
        "djinn_scheduler_workers 1.0",
        'djinn_worker_pool_blocks{pool="device",state="free",worker="worker-0"} 100.0',
        "djinn_workers_stores_total 0.0",
        'djinn_scheduler_predicted_wakes_total{source="none"} 0.0',
        'djinn_scheduler_prefetches_total{outcome="sent"} 0.0',
        'djinn_scheduler_admissions_total{outcome="admitted"} 1.0',
        "djinn_scheduler_admission_queue 0.0",
    ):
        assert line in lines, line
