"""Workers connect, are lost, come back; schedulers are killed."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta

import grpc

from djinn.v1 import admin_service_pb2 as admin_pb
from djinn.v1 import agent_service_pb2 as agent_pb
from djinn.v1 import control_service_pb2 as control_pb
from djinn.v1 import control_service_pb2_grpc as control_grpc
from services.common.errors import (
    InvalidRequestError,
)
from tests.support.fake_worker import FakeWorker
from tests.support.scheduler_system import COMPUTE, CONFIG, IO_WAIT, refused

# --- workers connect ---


async def test_a_worker_is_welcomed_and_listed(system, worker):
    assert worker.welcome.scheduler_epoch == system.scheduler.coordinator.epoch
    assert worker.welcome.report_interval.ToTimedelta() == timedelta(seconds=1)
    listed = (await system.admin.ListWorkers(admin_pb.ListWorkersRequest())).workers
    assert [entry.worker_id for entry in listed] == ["worker-0"]
    assert listed[0].incarnation_id == worker.incarnation_id
    assert listed[0].endpoint == worker.endpoint
    assert listed[0].capacity.device_blocks == worker.device_blocks
    assert not listed[0].HasField("report")


async def test_a_stream_begins_with_hello(system):
    connect = control_grpc.WorkerControlServiceStub(system.channel).Connect
    for first in (control_pb.ConnectRequest(ack=control_pb.CommandAck()), None):
        call = connect(iter([first] if first else []))
        error = await refused(call.read(), InvalidRequestError)
        assert "Hello" in error.message
    for hello, field in (
        (control_pb.Hello(worker_id="no way"), "worker_id"),
        (control_pb.Hello(worker_id="w"), "incarnation_id"),
        (control_pb.Hello(worker_id="w", incarnation_id="i"), "advertised_endpoint"),
    ):
        call = connect(iter([control_pb.ConnectRequest(hello=hello)]))
        error = await refused(call.read(), InvalidRequestError)
        assert error.metadata["field"] == field


async def test_a_new_stream_of_a_worker_replaces_the_old_one(systems, system, worker, opened):
    twin = FakeWorker("worker-0", endpoint="127.0.0.1:2")
    twin.incarnation_id = worker.incarnation_id
    twin.sessions = dict(worker.sessions)
    await twin.connect(system.address)
    await worker.wait_ended()
    assert worker.ended is grpc.StatusCode.UNAVAILABLE
    assert "replaced" in worker.ended_details
    await system.signal(IO_WAIT, 1)
    await twin.expect("evict")
    assert (await system.get()).worker_endpoint == "127.0.0.1:2"
    await twin.disconnect()


async def test_nonsense_from_a_worker_does_not_end_its_stream(system, worker, opened):
    worker.send(hello=worker.hello())
    worker.send(ack=control_pb.CommandAck(command_id="never sent"))
    worker.send(result=control_pb.CommandResult(command_id="never sent", session_id="nobody"))
    worker.send(session_event=control_pb.SessionEvent())
    worker._outbox.put_nowait(control_pb.ConnectRequest())
    await system.signal(IO_WAIT, 1)
    await worker.expect("evict")
    assert worker.ended is None


# --- loss and return ---


async def test_a_restarted_scheduler_is_told_all_by_the_snapshot(systems, system, worker, opened):
    await system.signal(IO_WAIT, 7, tool_name="web_search")
    await worker.expect("evict")
    other = await systems.start()
    await worker.connect(other.address)
    assert worker.welcome.scheduler_epoch != opened.scheduler_epoch
    session = await other.get("a")
    assert (session.phase, session.phase_sequence) == (IO_WAIT, 7)
    assert session.tool_name == "web_search"
    assert session.context_length == 50
    assert session.generation == worker.sessions["a"].generation
    response = await other.signal(COMPUTE, 8)
    assert response.worker_endpoint == worker.endpoint
    assert response.scheduler_epoch == worker.welcome.scheduler_epoch
    await worker.expect("restore")


async def test_a_restarted_scheduler_learns_a_session_from_its_token(systems, opened):
    other = await systems.start()
    response = await other.signal(COMPUTE, 3, session_token=opened.session_token)
    assert (response.phase, response.sequence) == (COMPUTE, 3)
    assert response.worker_endpoint == ""
    worker = await systems.worker(other)
    command_free = await other.get("a")
    assert command_free.worker_endpoint == worker.endpoint
    await worker.expect("open")


async def test_a_lost_worker_that_comes_back_anew_gets_its_sessions_lazily(system, worker, opened):
    await system.signal(IO_WAIT, 1)
    await worker.expect("evict")
    await worker.disconnect()
    while (await system.get()).worker_endpoint:
        continue
    assert (await system.get()).phase == IO_WAIT
    worker.restart()
    await worker.connect(system.address)
    assert worker.no_more_commands()
    response = await system.signal(COMPUTE, 2)
    assert response.worker_endpoint == worker.endpoint
    await worker.expect("open")
    session = await system.get()
    assert (session.phase, session.context_length, session.kv.total_blocks) == (COMPUTE, 0, 0)
    worker.generate("a")
    await system.signal(IO_WAIT, 3)
    evict = await worker.expect("evict")
    assert evict.expected_generation == worker.sessions["a"].generation


async def test_another_worker_takes_over_after_the_grace(systems):
    system = await systems.start(replace(CONFIG, worker_grace_s=0.0))
    first = await systems.worker(system, "w0", endpoint="h:1", device_blocks=500)
    await system.open("a")
    await first.expect("open")
    first.generate("a")
    second = await systems.worker(system, "w1", endpoint="h:2")
    await first.disconnect()
    while len((await system.admin.ListWorkers(admin_pb.ListWorkersRequest())).workers) == 2:
        continue
    response = await system.signal(COMPUTE, 1)
    assert response.worker_endpoint == "h:2"
    await second.expect("open")
    second.generate("a")
    await system.until(lambda session: session.context_length == 50)
    await first.connect(system.address)
    await first.expect("close")
    assert (await system.get()).worker_id == "w1"


async def test_commands_survive_a_broken_stream(system, worker, opened):
    worker.hold("evict")
    await system.signal(IO_WAIT, 1)
    first = await worker.expect("evict")
    worker.hold()
    await worker.connect(system.address)
    again = await worker.expect("evict")
    assert again.command_id == first.command_id
    await system.until(lambda session: not session.kv.resident)


# --- the end ---


async def test_stopping_ends_streams_and_says_so(systems):
    system = await systems.start()
    worker = await systems.worker(system)
    await system.open("a")
    stream = system.agents.StreamPhases()
    await stream.write(
        agent_pb.StreamPhasesRequest(
            signal=agent_pb.SignalPhaseRequest(session_id="a", phase=COMPUTE, sequence=1)
        )
    )
    assert (await stream.read()).response.phase == COMPUTE
    stopping = asyncio.ensure_future(system.scheduler.stop())
    await worker.wait_ended()
    assert worker.ended is grpc.StatusCode.UNAVAILABLE
    assert "about to stop" in worker.ended_details
    assert await stream.code() is grpc.StatusCode.UNAVAILABLE
    await stopping
