from __future__ import annotations

import msgspec
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from djinn.v1 import control_service_pb2 as pb
from services.common.errors import InvalidRequestError, StaleGenerationError
from services.common.status import error_from_status
from services.worker import messages
from services.worker.front.convert import control
from tests.support.stand_ins import MODEL, command_done, report, session_state

WAKE = Timestamp(seconds=5, nanos=7)


def command(**fields: object) -> pb.Command:
    return pb.Command(**{"command_id": "c", "session_id": "s", **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "action"),
    [
        ({"open": pb.OpenAction(cache_salt="x", priority=3)}, messages.Open("x", 3)),
        ({"close": pb.CloseAction()}, messages.Close()),
        ({"evict": pb.EvictAction()}, messages.Evict(messages.EvictMode.LAZY, None)),
        (
            {"evict": pb.EvictAction(mode=pb.EVICT_MODE_SCRUB, expected_wake_time=WAKE)},
            messages.Evict(messages.EvictMode.SCRUB, 5_000_000_007),
        ),
        (
            {"evict": pb.EvictAction(mode=pb.EVICT_MODE_RELEASE)},
            messages.Evict(messages.EvictMode.RELEASE, None),
        ),
        ({"restore": pb.RestoreAction()}, messages.Restore()),
        ({"prefetch": pb.PrefetchAction()}, messages.Prefetch()),
        ({"drop": pb.DropAction()}, messages.Drop()),
        ({"set_hint": pb.SetHintAction(priority=-2)}, messages.SetHint(None, -2)),
        (
            {"set_hint": pb.SetHintAction(expected_wake_time=WAKE)},
            messages.SetHint(5_000_000_007, None),
        ),
    ],
)
def test_every_action_is_converted(fields: dict[str, object], action: messages.Action) -> None:
    converted = control.command(command(**fields), received_ns=9)
    assert converted == messages.Command("c", "s", action, received_ns=9)


def test_what_is_set_is_told_from_what_is_not() -> None:
    received = command(
        close=pb.CloseAction(),
        expected_generation=0,
        scheduler_record=b"",
        timeout=Duration(seconds=5),
    )
    converted = control.command(received, 7)
    assert converted.expected_generation == 0
    assert converted.scheduler_record == b""
    assert converted.deadline_ns == 5_000_000_007


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"command_id": "", "close": pb.CloseAction()}, "command_id"),
        ({"command_id": "x" * 257, "close": pb.CloseAction()}, "command_id"),
        ({"session_id": "a b", "close": pb.CloseAction()}, "session_id"),
        ({}, "action"),
        ({"evict": pb.EvictAction(mode=99)}, "evict.mode"),  # type: ignore[arg-type]
        ({"open": pb.OpenAction(priority=101)}, "open.priority"),
        ({"set_hint": pb.SetHintAction(priority=-101)}, "set_hint.priority"),
        ({"close": pb.CloseAction(), "timeout": Duration()}, "timeout"),
        ({"close": pb.CloseAction(), "timeout": Duration(seconds=-1)}, "timeout"),
        ({"close": pb.CloseAction(), "timeout": Duration(seconds=2**62)}, "timeout"),
        (
            {"evict": pb.EvictAction(expected_wake_time=Timestamp(nanos=-1))},
            "evict.expected_wake_time",
        ),
    ],
)
def test_a_malformed_command_is_refused_by_field(fields: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        control.command(command(**fields), 0)
    assert caught.value.metadata["field"] == field


def test_a_mode_is_converted_flag_by_flag() -> None:
    for name in ("write_through", "offload", "share_prefixes"):
        welcome = pb.Welcome(mode=pb.WorkerMode(**{name: True}))
        mode = messages.Mode(write_through=False, offload=False, share_prefixes=False)
        assert control.set_mode(welcome).mode == msgspec.structs.replace(mode, **{name: True})


def test_a_scheduler_that_says_no_mode_narrows_nothing() -> None:
    assert control.set_mode(pb.Welcome()) == messages.SetMode(messages.Mode(True, True, True))


def test_a_result_tells_what_was_moved_and_how_long_it_took() -> None:
    done = command_done(
        moved_bytes=9, moved_blocks=2, resident_blocks=1, received_ns=100, copy_start_ns=150,
        copy_end_ns=400, done_ns=500,
    )  # fmt: skip
    result = control.result(done).result
    assert (result.moved_bytes, result.moved_blocks, result.resident_blocks) == (9, 2, 1)
    assert result.queue_duration.ToNanoseconds() == 50
    assert result.copy_duration.ToNanoseconds() == 250
    assert result.HasField("status")
    assert result.status.code == 0


def test_a_result_without_copies_waited_until_its_end() -> None:
    result = control.result(command_done(received_ns=100, done_ns=500)).result
    assert result.queue_duration.ToNanoseconds() == 400
    assert result.copy_duration.ToNanoseconds() == 0


def test_a_failed_result_carries_the_error() -> None:
    error = StaleGenerationError("moved on", metadata={"generation": "4"})
    result = control.result(command_done(error=error.to_info())).result
    back = error_from_status(result.status)
    assert isinstance(back, StaleGenerationError)
    assert back.metadata == {"generation": "4"}


def test_hello_tells_everything() -> None:
    identity = control.WorkerIdentity("w", "i", "h:1", "h:2")
    hello = control.hello(identity, MODEL, [session_state("a"), session_state("b")], draining=True)
    sent = hello.hello
    assert (sent.worker_id, sent.incarnation_id, sent.draining) == ("w", "i", True)
    assert (sent.advertised_endpoint, sent.metrics_endpoint) == ("h:1", "h:2")
    assert sent.capacity.host_blocks == 20
    assert sent.model.vocab_size == 100
    assert [session.session_id for session in sent.snapshot] == ["a", "b"]
    session = sent.snapshot[0]
    assert session.scheduler_record == b"record"
    assert session.last_generate_time.ToNanoseconds() == 9_000
    assert session.kv.resident


def test_a_session_that_never_generated_has_no_time_of_it() -> None:
    state = messages.SessionState("s", 0, 0, messages.Residency(), False, b"", None)
    event = messages.SessionEvent(messages.SessionEventKind.CREATED, state, 5)
    sent = control.session_event(event).session_event
    assert sent.type == pb.SESSION_EVENT_TYPE_CREATED
    assert not sent.session.HasField("last_generate_time")


@pytest.mark.parametrize("kind", list(messages.SessionEventKind))
def test_every_event_has_its_type(kind: messages.SessionEventKind) -> None:
    sent = control.session_event(messages.SessionEvent(kind, session_state(), 5)).session_event
    assert pb.SessionEventType.Name(sent.type) == f"SESSION_EVENT_TYPE_{kind.name}"


def test_a_report_tells_the_mean_step_of_its_interval() -> None:
    sent = control.memory_report(report(), [0.01, 0.03]).memory_report
    assert sent.mean_step_duration.ToNanoseconds() == 20_000_000
    assert sent.device.free_blocks + sent.device.used_blocks == 7
    assert sent.counters.stored_bytes == 300
    assert not control.memory_report(report(), []).memory_report.HasField("mean_step_duration")


def test_every_counter_is_reported() -> None:
    names = messages.Counters.__struct_fields__
    counters = messages.Counters(**{name: i + 1 for i, name in enumerate(names)})
    sent = control.worker_counters(counters)
    assert {f.name: getattr(sent, f.name) for f in sent.DESCRIPTOR.fields} == {
        name: i + 1 for i, name in enumerate(names)
    }
