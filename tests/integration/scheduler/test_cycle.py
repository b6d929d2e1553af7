"""Tool calls, wakes and what they make a worker do."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from djinn.v1 import agent_service_pb2 as agent_pb
from djinn.v1 import control_service_pb2 as control_pb
from djinn.v1 import types_pb2 as types
from services.common.errors import (
    InternalError,
    SessionBusyError,
)
from services.scheduler import record
from tests.support.fake_worker import BLOCKS_PER_SESSION
from tests.support.scheduler_system import COMPUTE, CONFIG, IO_WAIT


async def test_a_session_is_opened_on_the_worker(system, worker):
    response = await system.open("a", name="researcher", tenant_id="acme", priority=5)
    session = response.session
    assert (session.session_id, session.name, session.tenant_id) == ("a", "researcher", "acme")
    assert session.phase == types.AGENT_PHASE_OPEN
    assert session.worker_endpoint == worker.endpoint
    assert response.scheduler_epoch == worker.welcome.scheduler_epoch
    assert response.session_token
    command = await worker.expect("open")
    assert command.open.cache_salt == "acme"
    assert command.open.priority == 5


async def test_a_tool_call_evicts_and_its_end_restores(system, worker, opened):
    request = agent_pb.SignalPhaseRequest(
        session_id="a", phase=IO_WAIT, sequence=1, tool_name="web_search"
    )
    request.expected_duration.FromTimedelta(timedelta(seconds=12))
    response = await system.agents.SignalPhase(request)
    assert (response.phase, response.sequence, response.ignored) == (IO_WAIT, 1, False)
    assert response.worker_endpoint == worker.endpoint
    evict = await worker.expect("evict")
    assert evict.evict.mode == control_pb.EVICT_MODE_LAZY
    assert evict.expected_generation == worker.sessions["a"].generation
    told = record.decode(evict.scheduler_record)
    assert told is not None
    assert (told.sequence, told.tool_name, told.expected_s) == (1, "web_search", 12.0)
    wake_s = evict.evict.expected_wake_time.ToNanoseconds() / 1e9
    assert wake_s == pytest.approx(told.phase_since_s + 12, abs=1e-3)
    await system.until(lambda session: session.kv.host_blocks == BLOCKS_PER_SESSION)
    waiting = await system.get()
    assert waiting.tool_name == "web_search"
    assert waiting.expected_wake_time == evict.evict.expected_wake_time

    response = await system.signal(COMPUTE, 2)
    assert response.phase == COMPUTE
    restore = await worker.expect("restore")
    assert not restore.HasField("expected_generation")
    assert restore.HasField("timeout")
    await system.until(lambda session: session.kv.resident)
    assert not (await system.get()).HasField("expected_wake_time")


async def test_late_and_repeated_signals_change_nothing(system, worker, opened):
    await system.signal(IO_WAIT, 1)
    await worker.expect("evict")
    await system.signal(COMPUTE, 2)
    await worker.expect("restore")
    for phase, sequence in ((COMPUTE, 2), (IO_WAIT, 1), (IO_WAIT, 2)):
        response = await system.signal(phase, sequence)
        assert (response.phase, response.sequence, response.ignored) == (COMPUTE, 2, True)
    await system.signal(IO_WAIT, 3)
    await worker.expect("evict")
    assert worker.no_more_commands()


async def test_an_eviction_refused_for_a_generate_comes_after_it(system, worker, opened):
    worker.refuse("evict", SessionBusyError("a Generate is running"))
    await system.signal(IO_WAIT, 1)
    first = await worker.expect("evict")
    worker.start_generate("a")
    await system.until(lambda session: session.generation == worker.sessions["a"].generation)
    worker.finish_generate("a")
    second = await worker.expect("evict")
    assert second.command_id != first.command_id
    assert second.expected_generation == worker.sessions["a"].generation
    await system.until(lambda session: not session.kv.resident)


async def test_a_failed_command_does_not_end_the_stream(system, worker, opened):
    worker.refuse("evict", InternalError("a bug"))
    await system.signal(IO_WAIT, 1)
    await worker.expect("evict")
    await system.signal(COMPUTE, 2)
    await worker.expect("restore")
    assert worker.ended is None


async def test_a_silent_session_is_evicted_once_idle(systems):
    system = await systems.start(replace(CONFIG, idle_threshold_s=0.01))
    worker = await systems.worker(system)
    await system.open("a")
    await worker.expect("open")
    worker.generate("a")
    await worker.expect("evict")
    await system.until(lambda session: not session.kv.resident)
    assert (await system.get()).phase == types.AGENT_PHASE_OPEN


async def test_the_reactive_policy_leaves_all_to_the_worker(systems):
    system = await systems.start(replace(CONFIG, policy="reactive-lru"))
    worker = await systems.worker(system)
    await system.open("a")
    await worker.expect("open")
    worker.generate("a")
    assert (await system.signal(IO_WAIT, 1)).phase == IO_WAIT
    assert (await system.signal(COMPUTE, 2)).phase == COMPUTE
    await system.close("a")
    await worker.expect("close")


async def test_an_unanswered_command_comes_again_under_its_id(systems):
    system = await systems.start(replace(CONFIG, command_timeout_s=0.05))
    worker = await systems.worker(system)
    await system.open("a")
    await worker.expect("open")
    worker.generate("a")
    worker.hold("evict")
    await system.signal(IO_WAIT, 1)
    first = await worker.expect("evict")
    again = await worker.expect("evict")
    assert again.command_id == first.command_id
    # Counted anew from each time that it is sent, and so from each receipt.
    for sent in (first, again):
        assert 0 < sent.timeout.ToNanoseconds() <= 50_000_000
    worker.hold()
    await worker.expect("evict")
    await system.until(lambda session: not session.kv.resident)
