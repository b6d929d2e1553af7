"""AdminService."""

from __future__ import annotations

from djinn.v1 import admin_service_pb2 as admin_pb
from djinn.v1 import control_service_pb2 as control_pb
from djinn.v1 import types_pb2 as types
from services.common.errors import (
    CommandTimeoutError,
    InvalidRequestError,
    SessionBusyError,
    UnknownSessionError,
)
from tests.support.fake_worker import BLOCK_BYTES, BLOCKS_PER_SESSION
from tests.support.scheduler_system import COMPUTE, IO_WAIT, refused


async def test_an_operator_moves_a_session_and_hears_how_it_went(system, worker, opened):
    evicted = await system.admin.EvictSession(
        admin_pb.EvictSessionRequest(session_id="a", mode=control_pb.EVICT_MODE_SCRUB)
    )
    assert evicted.result.status.code == 0
    assert evicted.result.moved_bytes == BLOCKS_PER_SESSION * BLOCK_BYTES
    assert not evicted.result.kv.resident
    command = await worker.expect("evict")
    assert command.evict.mode == control_pb.EVICT_MODE_SCRUB
    assert not command.HasField("expected_generation")
    restored = await system.admin.RestoreSession(admin_pb.RestoreSessionRequest(session_id="a"))
    assert restored.result.kv.resident
    again = await system.admin.RestoreSession(admin_pb.RestoreSessionRequest(session_id="a"))
    assert again.result.resident_blocks == BLOCKS_PER_SESSION
    dropped = await system.admin.DropSession(admin_pb.DropSessionRequest(session_id="a"))
    assert dropped.result.kv.missing_tokens == 50


async def test_an_operators_command_fails_as_the_worker_says(system, worker, opened):
    worker.refuse("evict", SessionBusyError("session 'a' runs a Generate"))
    evict = system.admin.EvictSession(admin_pb.EvictSessionRequest(session_id="a"))
    error = await refused(evict, SessionBusyError)
    assert error.message == "session 'a' runs a Generate"
    drop = system.admin.DropSession(admin_pb.DropSessionRequest(session_id="b"))
    await refused(drop, UnknownSessionError)
    bad = system.admin.EvictSession(admin_pb.EvictSessionRequest(session_id="a", mode=9))  # type: ignore[arg-type]
    await refused(bad, InvalidRequestError)


async def test_an_operators_command_ends_before_its_callers_deadline(system, worker, opened):
    worker.hold("drop")
    call = system.admin.DropSession(admin_pb.DropSessionRequest(session_id="a"), timeout=0.3)
    await refused(call, CommandTimeoutError)


async def test_stats_add_the_workers_up(systems, system):
    first = await systems.worker(system, "w0")
    second = await systems.worker(system, "w1")
    await system.open("a")
    await system.open("b")
    await system.signal(IO_WAIT, 1, session_id="b")
    for worker, stores in ((first, 3), (second, 4)):
        worker.counters.stores = stores
        worker.report()
    stats = await system.admin.GetStats(admin_pb.GetStatsRequest())
    while stats.counters.stores != 7:
        stats = await system.admin.GetStats(admin_pb.GetStatsRequest())
    assert stats.policy == "semantic"
    assert {count.phase: count.sessions for count in stats.phases} == {
        types.AGENT_PHASE_OPEN: 1,
        COMPUTE: 0,
        IO_WAIT: 1,
    }
    assert stats.device.total_blocks == 200
    assert stats.host.total_blocks == 800
    first.restart()
    await first.connect(system.address)
    first.counters.stores = 10
    first.report()
    while stats.counters.stores != 17:
        stats = await system.admin.GetStats(admin_pb.GetStatsRequest())
