"""Spans as a collector that is not ours receives them.

The collector is rotel (``pip install rotel`` in a virtual environment of its own); its program is
found on the path as ``rotel-agent`` or named by ``ROTEL_AGENT``.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from djinn_client.tracing import tracer_provider
from services.common.config import TelemetryConfig
from services.common.telemetry import context_from_traceparent, record_span, setup
from tests.support.djinn_server import READY_LINE, SPANS_OF_A_WAKE, TRACED, Server, wake_up

pytestmark = [pytest.mark.peer, pytest.mark.timeout(240)]

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = f"00-{TRACE_ID}-b7ad6b7169203331-01"


@pytest.fixture
def rotel(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    program = os.environ.get("ROTEL_AGENT") or shutil.which("rotel-agent")
    if program is None:
        pytest.skip("rotel-agent is not on the path")
    with (
        socket.create_server(("127.0.0.1", 0)) as grpc,
        socket.create_server(("127.0.0.1", 0)) as http,
    ):
        grpc_port, http_port = grpc.getsockname()[1], http.getsockname()[1]
    output = tmp_path / "rotel.log"
    with output.open("wb") as log:
        agent = subprocess.Popen(
            [
                program,
                "start",
                f"--otlp-grpc-endpoint=127.0.0.1:{grpc_port}",
                f"--otlp-http-endpoint=127.0.0.1:{http_port}",
                "--exporter=blackhole",
                "--debug-log=traces",
                "--debug-log-verbosity=detailed",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    yield f"http://127.0.0.1:{grpc_port}", output
    agent.terminate()
    agent.wait()


def test_a_span_arrives_with_its_trace_parent_and_attributes(
    rotel: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint, output = rotel
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
    telemetry = setup("djinn-worker", TelemetryConfig(), "w-1")

    record_span(
        telemetry.tracer("m"),
        "kv.restore",
        context_from_traceparent(TRACEPARENT),
        1_700_000_000_000_000_000,
        1_700_000_000_010_000_000,
        {"djinn.bytes": 563_000_000},
    )
    # The exporter tries again until the collector listens.
    telemetry.shutdown(timeout_s=30)

    received = output.read_text()
    assert re.search(rf"trace id\s*: {TRACE_ID}", received, re.IGNORECASE), received
    assert "kv.restore" in received
    assert "djinn-worker" in received
    assert "563000000" in received


async def test_all_spans_of_a_wake_arrive_under_one_trace_id(
    rotel: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint, output = rotel
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
    provider = tracer_provider("agent")
    assert provider is not None
    with Server(tmp_path, *TRACED) as server:
        server.read_until(READY_LINE)
        await wake_up(server, provider)

    received = traces(output.read_text())
    [wake] = [names for names in received.values() if ("agent", "agent.wake") in names]
    assert wake >= SPANS_OF_A_WAKE


def traces(printed: str) -> dict[str, set[tuple[str, str]]]:
    """Returns the (service, span) pairs of each trace id in what the collector printed."""
    found: defaultdict[str, set[tuple[str, str]]] = defaultdict(set)
    service = trace_id = ""
    for line in printed.splitlines():
        if said := re.match(r" *-> service\.name: Str\((.*)\)", line):
            service = said[1]
        elif said := re.match(r" *Trace ID *: (\w+)", line):
            trace_id = said[1]
        elif said := re.match(r" *Name *: (.*\S)", line):
            found[trace_id].add((service, said[1]))
    return found
