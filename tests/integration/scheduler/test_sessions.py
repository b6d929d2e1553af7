"""Opening, closing, asking, and what is refused."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta

import pytest

from djinn.v1 import admin_service_pb2 as admin_pb
from djinn.v1 import agent_service_pb2 as agent_pb
from djinn.v1 import types_pb2 as types
from services.common.errors import (
    ExhaustedError,
    InvalidRequestError,
    NoWorkerError,
    SessionClosedError,
    SessionExistsError,
    UnknownSessionError,
    UnknownWorkerError,
    UnsupportedError,
)
from services.common.status import error_from_status
from tests.support.scheduler_system import COMPUTE, CONFIG, IO_WAIT, refused

# --- opening, closing, asking ---


async def test_opening_is_idempotent_by_id_and_tenant(system, worker):
    first = await system.open("a", tenant_id="acme")
    again = await system.open("a", tenant_id="acme", name="another name")
    assert again.session.open_time == first.session.open_time
    assert again.session.name == first.session.name
    assert again.session_token == first.session_token
    await refused(system.open("a", tenant_id="other"), SessionExistsError)
    made = await system.agents.OpenSession(agent_pb.OpenSessionRequest())
    assert made.session.session_id not in {"", "a"}
    await worker.expect("open")
    await worker.expect("open")
    assert worker.no_more_commands()


async def test_closing_is_idempotent_and_final(system, worker, opened):
    await system.close("a")
    await system.close("a")
    await system.close("never-known")
    await worker.expect("close")
    assert worker.no_more_commands()
    await refused(system.signal(COMPUTE, 1), SessionClosedError)
    await refused(system.signal(COMPUTE, 1, session_token=opened.session_token), SessionClosedError)
    await refused(system.open("a"), SessionClosedError)
    await refused(system.get("a"), UnknownSessionError)
    assert not (await system.agents.ListSessions(agent_pb.ListSessionsRequest())).sessions


async def test_an_unknown_session_needs_its_token(systems, system, worker, opened):
    await refused(system.signal(COMPUTE, 1, session_id="b"), UnknownSessionError)
    await refused(
        system.signal(COMPUTE, 1, session_id="b", session_token=b"junk"), InvalidRequestError
    )
    await refused(
        system.signal(COMPUTE, 1, session_id="b", session_token=opened.session_token),
        InvalidRequestError,
    )


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"phase": types.AGENT_PHASE_UNSPECIFIED}, "phase"),
        ({"phase": types.AGENT_PHASE_OPEN}, "phase"),
        ({"phase": types.AGENT_PHASE_CLOSED}, "phase"),
        ({"phase": 99}, "phase"),
        ({"sequence": 0}, "sequence"),
        ({"sequence": -1}, "sequence"),
        ({"session_id": ""}, "session_id"),
        ({"session_id": "a b"}, "session_id"),
        ({"tool_name": "x" * 257}, "tool_name"),
    ],
)
async def test_a_bad_signal_is_refused_by_its_field(system, worker, opened, fields, field):
    values = {"session_id": "a", "phase": IO_WAIT, "sequence": 1} | fields
    call = system.agents.SignalPhase(agent_pb.SignalPhaseRequest(**values))
    error = await refused(call, InvalidRequestError)
    assert error.metadata["field"] == field
    assert (await system.get()).phase == types.AGENT_PHASE_OPEN


@pytest.mark.parametrize("seconds", [0, -1, 1e9])
async def test_an_impossible_expected_duration_is_refused(system, worker, opened, seconds):
    request = agent_pb.SignalPhaseRequest(session_id="a", phase=IO_WAIT, sequence=1)
    request.expected_duration.FromTimedelta(timedelta(seconds=seconds))
    error = await refused(system.agents.SignalPhase(request), InvalidRequestError)
    assert error.metadata["field"] == "expected_duration"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"session_id": "no/slash"}, "session_id"),
        ({"session_id": ""}, "session_id"),
        ({"priority": 101}, "priority"),
        ({"priority": -101}, "priority"),
        ({"name": "n" * 257}, "name"),
        ({"tenant_id": "t" * 257}, "tenant_id"),
        ({"expected_prompt_tokens": -1}, "expected_prompt_tokens"),
    ],
)
async def test_a_bad_opening_is_refused_by_its_field(system, worker, fields, field):
    call = system.agents.OpenSession(agent_pb.OpenSessionRequest(**fields))
    error = await refused(call, InvalidRequestError)
    assert error.metadata["field"] == field


async def test_sessions_are_listed_in_pages(system, worker):
    for number in range(7):
        await system.open(f"s{number}", tenant_id="acme" if number % 2 else "")
    await system.signal(IO_WAIT, 1, session_id="s3")
    found: list[str] = []
    token = ""
    for size in (3, 3, 1):
        page = await system.agents.ListSessions(
            agent_pb.ListSessionsRequest(page_size=3, page_token=token)
        )
        assert len(page.sessions) == size
        found += [session.session_id for session in page.sessions]
        token = page.next_page_token
    assert token == ""
    assert found == [f"s{number}" for number in range(7)]
    of_tenant = await system.agents.ListSessions(agent_pb.ListSessionsRequest(tenant_id="acme"))
    assert [session.session_id for session in of_tenant.sessions] == ["s1", "s3", "s5"]
    of_default = await system.agents.ListSessions(agent_pb.ListSessionsRequest(tenant_id=""))
    assert len(of_default.sessions) == 4
    waiting = await system.agents.ListSessions(agent_pb.ListSessionsRequest(phase=IO_WAIT))
    assert [session.session_id for session in waiting.sessions] == ["s3"]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"page_size": -1}, "page_size"),
        ({"page_size": 1001}, "page_size"),
        ({"page_token": "not base64!"}, "page_token"),
        ({"page_token": "/w=="}, "page_token"),
        ({"phase": 99}, "phase"),
    ],
)
async def test_a_bad_listing_is_refused_by_its_field(system, worker, fields, field):
    call = system.agents.ListSessions(agent_pb.ListSessionsRequest(**fields))
    error = await refused(call, InvalidRequestError)
    assert error.metadata["field"] == field


async def test_a_stream_of_phases_answers_each_signal(system, worker):
    for name in ("a", "b"):
        await system.open(name)

    def ask(session_id: str, phase: int, sequence: int) -> agent_pb.StreamPhasesRequest:
        signal = agent_pb.SignalPhaseRequest(
            session_id=session_id,
            phase=phase,  # type: ignore[arg-type] # some are wrong
            sequence=sequence,
        )
        return agent_pb.StreamPhasesRequest(signal=signal)

    asked = [
        ask("a", IO_WAIT, 1),
        ask("nobody", IO_WAIT, 1),
        ask("b", 99, 1),
        ask("b", IO_WAIT, 1),
        agent_pb.StreamPhasesRequest(),
        ask("a", COMPUTE, 2),
        ask("a", IO_WAIT, 1),
    ]
    answers = [answer async for answer in system.agents.StreamPhases(iter(asked))]
    assert [(answer.session_id, answer.sequence) for answer in answers] == [
        (request.signal.session_id, request.signal.sequence) for request in asked
    ]
    kinds = [answer.WhichOneof("outcome") for answer in answers]
    assert kinds == ["response", "error", "error", "response", "error", "response", "response"]
    reasons = [error_from_status(answers[index].error).reason for index in (1, 2, 4)]
    assert reasons == ["SESSION_UNKNOWN", "INVALID_REQUEST", "INVALID_REQUEST"]
    assert answers[5].response.phase == COMPUTE
    assert answers[6].response.ignored


# --- admission and places ---


async def test_at_the_limit_opening_alone_is_refused(systems):
    system = await systems.start(replace(CONFIG, max_sessions=1))
    await systems.worker(system)
    await system.open("a")
    error = await refused(system.open("b"), ExhaustedError)
    assert error.retry_after_s == 1.0
    assert "limit is 1" in error.message
    await system.open("a")
    assert (await system.signal(IO_WAIT, 1)).phase == IO_WAIT
    await system.close("a")
    await system.open("b")


async def test_opening_waits_for_a_worker(systems, system):
    opening = asyncio.ensure_future(system.open("a"))
    # The call has arrived once the scheduler counts it among those that wait.
    arrivals = system.scheduler._agents._arrivals
    while not arrivals._waiting:
        await system.admin.GetStats(admin_pb.GetStatsRequest())
    worker = await systems.worker(system)
    assert (await opening).session.worker_endpoint == worker.endpoint
    assert not arrivals._waiting


async def test_opening_does_not_wait_for_ever(systems):
    system = await systems.start(replace(CONFIG, worker_wait_s=0.05))
    error = await refused(system.open("a"), NoWorkerError)
    assert error.retry_after_s is not None
    system = await systems.start(CONFIG)
    call = system.agents.OpenSession(agent_pb.OpenSessionRequest(), timeout=0.5)
    await refused(call, NoWorkerError)


async def test_a_model_nobody_serves_is_refused_by_name(systems):
    system = await systems.start(replace(CONFIG, worker_wait_s=0.01))
    await systems.worker(system)
    error = await refused(system.open("a", model="gpt-9"), UnsupportedError)
    assert "'gpt-9'" in error.message
    assert "dummy:tiny" in error.message
    assert (await system.open("a", model="dummy:tiny")).session.session_id == "a"


async def test_a_drained_worker_gets_no_sessions(systems, system):
    first = await systems.worker(system, "w0", endpoint="h:1", device_blocks=500)
    await systems.worker(system, "w1", endpoint="h:2")
    assert (await system.open("a")).session.worker_id == "w0"
    drained = await system.admin.DrainWorker(admin_pb.DrainWorkerRequest(worker_id="w0"))
    assert drained.worker.draining
    assert (await system.open("b")).session.worker_id == "w1"
    resumed = await system.admin.DrainWorker(
        admin_pb.DrainWorkerRequest(worker_id="w0", resume=True)
    )
    assert not resumed.worker.draining
    assert (await system.open("c")).session.worker_id == "w0"
    await refused(
        system.admin.DrainWorker(admin_pb.DrainWorkerRequest(worker_id="w9")), UnknownWorkerError
    )
    await first.expect("open")


# --- expiry ---


async def test_the_time_at_which_a_session_expires_is_told(systems):
    system = await systems.start(replace(CONFIG, session_ttl_s=3600.0))
    await systems.worker(system)
    await system.open("a")
    first = (await system.get()).expire_time.ToNanoseconds()
    await system.signal(COMPUTE, 1)
    told = await system.get()
    assert told.expire_time.ToNanoseconds() > first
    assert told.expire_time.ToNanoseconds() - told.phase_time.ToNanoseconds() == pytest.approx(
        3600e9, abs=1e9
    )
    # Asking is not a sign of its client.
    assert (await system.get()).expire_time == told.expire_time


async def test_a_tool_call_lasts_while_the_clients_stream_is_open(systems):
    system = await systems.start(replace(CONFIG, session_ttl_s=3600.0))
    await systems.worker(system)
    await system.open("a")
    call = system.agents.StreamPhases()
    signal = agent_pb.SignalPhaseRequest(session_id="a", phase=IO_WAIT, sequence=1)
    await call.write(agent_pb.StreamPhasesRequest(signal=signal))
    await call.read()
    assert not (await system.get()).HasField("expire_time")
    await call.done_writing()
    await system.until(lambda session: session.HasField("expire_time"))


async def test_without_a_lifetime_no_session_expires(systems):
    system = await systems.start(replace(CONFIG, session_ttl_s=0.0))
    await systems.worker(system)
    await system.open("a")
    assert not (await system.get()).HasField("expire_time")


async def test_an_expired_session_says_so_and_is_counted(systems):
    system = await systems.start(replace(CONFIG, session_ttl_s=0.05, tick_interval_s=0.02))
    worker = await systems.worker(system)
    await system.open("a")
    await worker.expect("open")
    await worker.expect("close")
    error = await refused(system.signal(COMPUTE, 1), SessionClosedError)
    assert "EXPIRED" in error.message
    assert system.scheduler.coordinator.store.expired == 1
