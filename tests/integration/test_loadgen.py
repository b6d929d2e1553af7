"""Whole runs over real gRPC against the client's fake server, in spawned client processes."""

import asyncio
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import msgspec
import pytest

import djinn_client as djinn
from djinn_client.testing import FakeServer
from loadgen import config, report, runner, trace, verify
from loadgen.errors import ServerError
from loadgen.progress import NoProgress
from loadgen.record import (
    AgentRecord,
    RequestRecord,
    SignalRecord,
    StatsRecord,
    ToolRecord,
    read_requests,
    read_run,
)
from loadgen.runner import RunOptions
from loadgen.targets.base import TargetError
from loadgen.targets.djinn import DjinnTarget

CONFIGS = Path(config.__file__).parent / "configs"
QUICK = {
    "workload.arrival_rate": "50",
    "workload.think_time_min": "0.01",
    "workload.think_time_max": "0.05",
}


def load(name="poisson_smoke_test", **changes):
    overrides = QUICK | {f"workload.{key}": str(value) for key, value in changes.items()}
    return config.load(CONFIGS / f"{name}.yaml", overrides)


async def run(loaded, fake, out, **options):
    chosen = RunOptions(server=fake.endpoint, out=out, **options)
    return await runner.run(loaded, chosen, NoProgress())


def of_kind(folder, kind) -> list[Any]:
    return [record for record in read_requests(folder) if isinstance(record, kind)]


async def test_the_smoke_test_leaves_raw_records_and_a_report(tmp_path):
    async with FakeServer() as fake:
        folder = await run(load(), fake, tmp_path)
        signalled = [signal.phase.value for signal in fake.signals]
        told = [signal.expected_s for signal in fake.signals]
        sent = [len(request.append) for request in fake.requests]
    result = report.load(folder)
    assert result.passed
    assert result.aggregates["success_count"] == 10
    assert result.aggregates["requests_ok"] == 20
    assert result.aggregates["wakes"] == 10
    assert result.distributions["itl_ms"].count == 20 * 49
    assert (signalled.count("IO_WAIT"), signalled.count("COMPUTE")) == (10, 10)
    assert set(told) == {None}
    assert sorted(sent) == [32] * 10 + [1024] * 10
    info = read_run(folder)
    assert not info.interrupted
    assert info.lost_processes == 0
    assert info.model["model"] == "fake"
    assert info.config == load()
    assert [lag.samples > 0 for lag in info.loop_lag] == [True]
    assert "stores" in info.stats_before
    assert "stores" in info.stats_after
    assert len(of_kind(folder, SignalRecord)) == 20
    assert len(of_kind(folder, ToolRecord)) == 10


async def test_times_fit_together(tmp_path):
    async with FakeServer() as fake:
        folder = await run(load(total_agents=4), fake, tmp_path)
    agents = {agent.agent: agent for agent in of_kind(folder, AgentRecord)}
    for request in of_kind(folder, RequestRecord):
        agent = agents[request.agent]
        assert agent.scheduled_s <= agent.open_sent_s <= agent.opened_s <= agent.closed_s
        assert request.scheduled_s <= request.sent_s <= request.first_token_s <= request.end_s
        assert agent.opened_s <= request.sent_s
        assert request.end_s <= agent.done_s
        assert request.output_tokens == 50


async def test_agents_are_spread_over_processes_and_stay_live_to_the_end(tmp_path):
    async with FakeServer() as fake:
        loaded = load("demo", iterations=2, total_agents=7)
        folder = await run(loaded, fake, tmp_path, processes=3)
    agents = of_kind(folder, AgentRecord)
    assert len(agents) == 7
    assert read_run(folder).processes == 3
    last_end = max(agent.done_s for agent in agents)
    assert all(agent.closed_s is not None and agent.closed_s >= last_end for agent in agents)
    result = report.load(folder)
    assert result.aggregates["peak_live_agents"] == 7
    texts = [request for request in of_kind(folder, RequestRecord) if request.step == 0]
    assert all(request.prompt.startswith("system: ") and request.output for request in texts)


async def test_an_oracle_is_labelled(tmp_path):
    async with FakeServer() as fake:
        folder = await run(load(oracle="true", total_agents=2), fake, tmp_path)
        told = [signal.expected_s for signal in fake.signals if signal.phase == "IO_WAIT"]
    assert all(expected is not None and 0.01 <= expected <= 0.05 for expected in told)
    assert report.load(folder).labels == ["oracle"]


async def test_a_failing_request_fails_its_agent_alone(tmp_path):
    async with FakeServer() as fake:
        fake.fail("Generate", "INTERNAL", "a bug", after_tokens=3)
        folder = await run(load(total_agents=3), fake, tmp_path)
    result = report.load(folder)
    assert result.aggregates["success_count"] == 2
    assert [(error.reason, error.count) for error in result.errors] == [("INTERNAL", 1)]
    assert not result.passed
    (failed,) = (r for r in of_kind(folder, RequestRecord) if r.failure)
    assert failed.output_tokens == 3


async def test_who_is_not_admitted_comes_again_when_told(tmp_path):
    async with FakeServer() as fake:
        fake.fail("OpenSession", "EXHAUSTED", "full", times=2, retry_after_s=0.05)
        folder = await run(load(total_agents=2), fake, tmp_path)
    result = report.load(folder)
    assert result.aggregates["success_count"] == 2
    assert result.aggregates["refusals"] == 2


async def test_who_comes_again_keeps_its_session_and_so_its_place():
    async with FakeServer() as fake:
        fake.fail("OpenSession", "EXHAUSTED", "full", retry_after_s=0.05)
        target = await DjinnTarget.connect(fake.endpoint)
        session = target.session("a", "", 0)
        with pytest.raises(TargetError, match="EXHAUSTED"):
            await session.open()
        refused = session.session_id
        await session.open()
        await target.aclose()
    assert refused
    assert session.session_id == refused


async def test_tenants_have_connections_of_their_own():
    async with FakeServer() as fake:
        target = await DjinnTarget.connect(fake.endpoint)
        for tenant in ("", "red", "blue", "red"):
            session = target.session("a", tenant, 0)
            await session.open()
        found = {}
        for tenant in ("", "red", "blue"):
            async with await djinn.connect(fake.endpoint, tenant=tenant) as client:
                found[tenant] = len(await client.sessions())
        await target.aclose()
    assert found == {"": 1, "red": 2, "blue": 1}


async def test_a_lost_worker_costs_time_and_no_agent(tmp_path):
    async with FakeServer() as fake:
        fake.hold_tokens(5)
        running = asyncio.create_task(run(load(total_agents=2), fake, tmp_path))
        await fake.wait_until(lambda: len(fake.requests) >= 2)
        await fake.lose_worker()
        fake.release_tokens()
        await fake.start_worker()
        folder = await running
    result = report.load(folder)
    assert result.aggregates["success_count"] == 2
    assert result.aggregates["resends"] in {1, 2}


async def test_one_wake_is_one_trace(tmp_path):
    async with FakeServer() as fake:
        folder = await run(load(total_agents=2), fake, tmp_path, trace=True)
    wakes = trace.slowest_wakes(trace.read(trace.files_of(folder)), 5)
    assert len(wakes) == 2
    for spans in wakes:
        assert {"agent.wake", "signal_phase", "generate"} <= {span.name for span in spans}
    assert wakes[0][0].service == "djinn-loadgen"


async def test_ctrl_c_closes_the_sessions_and_still_reports(tmp_path):
    async with FakeServer() as fake:
        fake.hold_tokens(2)
        running = asyncio.create_task(run(load(total_agents=3), fake, tmp_path))
        await fake.wait_until(lambda: len(fake.requests) >= 3)
        os.kill(os.getpid(), signal.SIGINT)
        folder = await running
    assert read_run(folder).interrupted
    result = report.load(folder)
    assert result.interrupted
    assert [(error.reason, error.count) for error in result.errors] == [("INTERRUPTED", 3)]
    assert all(agent.closed_s is not None for agent in of_kind(folder, AgentRecord))


async def test_a_lost_client_process_is_reported(tmp_path):
    async with FakeServer() as fake:
        fake.hold_tokens(2)
        loaded = load(total_agents=4, mode="live")
        running = asyncio.create_task(run(loaded, fake, tmp_path, processes=2))
        await fake.wait_until(lambda: len(fake.requests) >= 4)
        multiprocessing.active_children()[0].kill()
        fake.release_tokens()
        folder = await running
    assert read_run(folder).lost_processes == 1
    result = report.load(folder)
    assert result.aggregates["success_count"] == 2
    assert [(error.reason, error.count) for error in result.errors] == [("NO_RECORD", 2)]


async def test_nobody_there_is_a_clear_error(tmp_path):
    options = RunOptions(server="localhost:1", out=tmp_path / "run")
    with pytest.raises(ServerError, match="localhost:1") as caught:
        await runner.run(load(), options, NoProgress())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


async def test_the_server_is_sampled_during_the_run(tmp_path):
    async with FakeServer() as fake:
        folder = await run(
            load(total_agents=1, think_time_max=1.5, think_time_min=1.5), fake, tmp_path
        )
    samples = of_kind(folder, StatsRecord)
    assert samples
    assert "device_total_blocks" in samples[0].stats


async def test_verify_wants_to_see_that_something_was_moved(tmp_path):
    """The fake holds no KV: its outputs are equal, and that alone proves nothing."""
    said: list[str] = []
    async with FakeServer() as fake:
        options = verify.VerifyOptions(server=fake.endpoint, prompts=2, context_length=20)
        result = await verify.run(options, said.append)
        evicted = [session for method, session in fake.commands if method == "EvictSession"]
    assert len(evicted) == 2
    assert len(said) == 2
    assert not result.passed
    assert all("no block was copied back" in prompt.problem for prompt in result.prompts)
    assert all(prompt.before.bitwise_equal for prompt in result.prompts)
    assert msgspec.json.decode(verify.to_json(result))["passed"] is False


async def test_verify_needs_room_for_its_prompts():
    async with FakeServer(max_context_length=100) as fake:
        options = verify.VerifyOptions(server=fake.endpoint, context_length=90)
        with pytest.raises(ServerError, match="--context-length 90: 154 tokens"):
            await verify.run(options, lambda text: None)
