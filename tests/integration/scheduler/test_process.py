"""The program ``djinn-scheduler`` as a process."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from djinn.v1 import agent_service_pb2 as agent_pb
from djinn.v1 import agent_service_pb2_grpc as agent_grpc
from djinn.v1 import types_pb2 as types
from services.scheduler.app import NAMES
from tests.support.fake_worker import FakeWorker

PROGRAM = (sys.executable, "-m", "services.scheduler")
FREE = ("--port", "0", "--metrics-port", "0")


class Process:
    """One scheduler process that is ready."""

    def __init__(self, process: asyncio.subprocess.Process, address: str) -> None:
        self.process = process
        self.address = address

    @classmethod
    async def start(cls, *flags: str) -> Process:
        process = await asyncio.create_subprocess_exec(
            *PROGRAM, *flags, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
        )
        assert process.stdout is not None
        line = (await process.stdout.readline()).decode()
        assert line.startswith("djinn-scheduler ready on "), line
        return cls(process, line.split()[-1])

    async def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.communicate()


@pytest.fixture
async def process() -> AsyncIterator[Process]:
    started = await Process.start(*FREE)
    yield started
    await started.kill()


async def run(*flags: str) -> tuple[int | None, str]:
    process = await asyncio.create_subprocess_exec(
        *PROGRAM, *flags, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    _, err = await process.communicate()
    return process.returncode, err.decode()


async def test_it_says_that_it_is_ready_and_ends_well_on_sigterm(process):
    async with grpc.aio.insecure_channel(process.address) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        for name in ("", *NAMES):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
    process.process.send_signal(signal.SIGTERM)
    assert await process.process.wait() == 0


async def test_a_busy_port_is_one_line_and_exit_code_2():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for flags in (
            ("--port", port, "--metrics-port", "0"),
            ("--port", "0", "--metrics-port", port),
        ):
            code, err = await run(*flags)
            assert code == 2
            last = err.strip().splitlines()[-1]
            assert port in last
            assert "in use" in last


async def test_killed_and_started_again_it_knows_its_sessions(process):
    port = process.address.rpartition(":")[2]
    worker = FakeWorker()
    await worker.connect(process.address)
    async with grpc.aio.insecure_channel(process.address) as channel:
        agents = agent_grpc.AgentServiceStub(channel)
        opened = await agents.OpenSession(agent_pb.OpenSessionRequest(session_id="a"))
        await worker.expect("open")
        worker.generate("a")
        waiting = agent_pb.SignalPhaseRequest(
            session_id="a", phase=types.AGENT_PHASE_IO_WAIT, sequence=1
        )
        await agents.SignalPhase(waiting)
        await worker.expect("evict")
    await process.kill()
    await worker.wait_ended()
    again = await Process.start("--port", port, "--metrics-port", "0")
    try:
        await worker.connect(again.address)
        async with grpc.aio.insecure_channel(again.address) as channel:
            agents = agent_grpc.AgentServiceStub(channel)
            woken = await agents.SignalPhase(
                agent_pb.SignalPhaseRequest(
                    session_id="a",
                    phase=types.AGENT_PHASE_COMPUTE,
                    sequence=2,
                    session_token=opened.session_token,
                )
            )
        assert woken.scheduler_epoch != opened.scheduler_epoch
        assert woken.worker_endpoint == worker.endpoint
        restore = await worker.expect("restore")
        assert restore.session_id == "a"
        await worker.disconnect()
    finally:
        await again.kill()


async def test_a_trace_file_holds_the_spans(tmp_path):
    path = tmp_path / "spans.jsonl"
    process = await Process.start(*FREE, "--trace-file", str(path))
    try:
        worker = FakeWorker()
        await worker.connect(process.address)
        async with grpc.aio.insecure_channel(process.address) as channel:
            agents = agent_grpc.AgentServiceStub(channel)
            await agents.OpenSession(agent_pb.OpenSessionRequest(session_id="a"))
            await agents.SignalPhase(
                agent_pb.SignalPhaseRequest(
                    session_id="a", phase=types.AGENT_PHASE_COMPUTE, sequence=1
                )
            )
        await worker.disconnect()
        process.process.send_signal(signal.SIGTERM)
        assert await process.process.wait() == 0
    finally:
        await process.kill()
    names = set()
    for line in path.read_text().splitlines():
        for resource in json.loads(line)["resourceSpans"]:
            for scope in resource["scopeSpans"]:
                names |= {span["name"] for span in scope["spans"]}
    assert {"open_session", "signal_phase", "policy.decide"} <= names
