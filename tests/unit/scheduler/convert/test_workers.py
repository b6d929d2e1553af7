from __future__ import annotations

from dataclasses import fields

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from djinn.v1 import control_service_pb2 as pb
from djinn.v1 import types_pb2 as types
from services.common.errors import SessionBusyError
from services.common.status import status_from_error
from services.scheduler.convert import workers as convert
from services.scheduler.convert.times import to_duration, to_seconds, to_timestamp
from services.scheduler.domain import (
    Close,
    Command,
    Counters,
    Drop,
    EventKind,
    Evict,
    EvictMode,
    Open,
    Prefetch,
    Residency,
    Restore,
    SetHint,
)


@pytest.mark.parametrize(
    ("action", "name"),
    [
        (Open("salt", 3), "open"),
        (Close(), "close"),
        (Evict(), "evict"),
        (Restore(), "restore"),
        (Prefetch(), "prefetch"),
        (Drop(), "drop"),
        (SetHint(), "set_hint"),
    ],
)
def test_every_action_can_be_sent(action, name):
    message = convert.to_command(Command("id", "a", action), 90.0).command
    assert message.WhichOneof("action") == name
    assert (message.command_id, message.session_id) == ("id", "a")
    assert not message.HasField("expected_generation")
    assert not message.HasField("timeout")
    assert not message.HasField("scheduler_record")


def test_a_command_carries_all_it_has():
    action = Evict(EvictMode.RELEASE, 1234.5)
    command = Command("id", "a", action, 0, 99.25, "00-trace", b"")
    message = convert.to_command(command, 90.0).command
    assert message.HasField("expected_generation")
    assert message.expected_generation == 0
    assert message.timeout.ToNanoseconds() == 9_250_000_000
    assert message.traceparent == "00-trace"
    assert message.HasField("scheduler_record")
    assert message.evict.mode == pb.EVICT_MODE_RELEASE
    assert message.evict.expected_wake_time.ToNanoseconds() == 1_234_500_000_000


def test_a_hint_tells_what_it_has():
    message = convert.to_command(Command("id", "a", SetHint(5.0, 0)), 90.0).command
    assert message.set_hint.expected_wake_time.seconds == 5
    assert message.set_hint.HasField("priority")
    assert not convert.to_command(Command("id", "a", SetHint()), 90.0).command.set_hint.HasField(
        "priority"
    )


def test_a_result_tells_how_it_went():
    message = pb.CommandResult(
        command_id="id",
        session_id="a",
        moved_bytes=10,
        moved_blocks=2,
        resident_blocks=3,
        copy_duration=to_duration(0.25),
        queue_duration=to_duration(0.5),
        generation=7,
        kv=types.KvResidency(total_blocks=5, device_blocks=4, host_blocks=3, missing_tokens=2),
    )
    result = convert.result(message)
    assert result.ok
    assert (result.moved_bytes, result.moved_blocks, result.resident_blocks) == (10, 2, 3)
    assert (result.copy_s, result.queue_s, result.generation) == (0.25, 0.5, 7)
    assert result.kv == Residency(5, 4, 3, 2, resident=False)


def test_a_failed_result_tells_why():
    message = pb.CommandResult(
        command_id="id", session_id="a", status=status_from_error(SessionBusyError("it runs"))
    )
    result = convert.result(message)
    assert not result.ok
    assert (result.code, result.reason) == ("FAILED_PRECONDITION", "SESSION_BUSY")
    assert result.message == "it runs"
    assert result.kv is None


@pytest.mark.parametrize("kind", list(EventKind))
def test_every_event_is_known(kind):
    message = pb.SessionEvent(
        type=pb.SessionEventType.Value(f"SESSION_EVENT_TYPE_{kind.name}"),
        session=pb.SessionSnapshot(session_id="a", generation=3, scheduler_record=b"r"),
        event_time=Timestamp(seconds=9),
    )
    event = convert.event(message)
    assert event is not None
    assert (event.kind, event.event_s) == (kind, 9.0)
    assert (event.session.generation, event.session.record) == (3, b"r")
    assert event.session.last_generate_s is None


def test_an_event_of_a_later_version_is_none():
    assert convert.event(pb.SessionEvent()) is None
    assert convert.event(pb.SessionEvent(type=77)) is None  # type: ignore[arg-type]


def test_a_report_is_taken_whole():
    counters = {column.name: number for number, column in enumerate(fields(Counters), start=1)}
    message = pb.MemoryReport(
        device=types.PoolReport(
            total_blocks=10, free_blocks=1, used_blocks=2, reclaimable_blocks=3, in_flight_blocks=4
        ),
        counters=types.WorkerCounters(**counters),
        running_sequences=5,
        waiting_requests=6,
        sessions=7,
        mean_step_duration=to_duration(0.0),
        load_bytes_per_second=8.0,
        prefill_tokens_per_second=9.0,
        loads_in_flight=1,
        stores_in_flight=2,
    )
    report = convert.report(message)
    assert report.counters == Counters(**counters)
    assert report.device.in_flight == 4
    assert report.host.total == 0
    assert report.mean_step_s == 0.0
    assert (report.loads_in_flight, report.stores_in_flight) == (1, 2)
    assert convert.report(pb.MemoryReport()).mean_step_s is None


def test_the_counters_here_are_those_of_the_protocol():
    names = {column.name for column in types.WorkerCounters.DESCRIPTOR.fields}
    assert names == {column.name for column in fields(Counters)}


@given(st.floats(0, 4e9))
def test_times_keep_their_microseconds(time_s):
    assert to_timestamp(time_s).ToNanoseconds() == pytest.approx(time_s * 1e9, abs=1e3)
    assert to_seconds(to_duration(time_s)) == pytest.approx(time_s, abs=1e-6)
