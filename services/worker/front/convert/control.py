"""WorkerControlService's messages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from google.protobuf.timestamp_pb2 import Timestamp

from djinn.v1 import control_service_pb2 as pb
from djinn.v1 import types_pb2
from services.common.errors import InvalidRequestError, from_info
from services.common.session_token import check_session_id
from services.common.status import status_from_error
from services.worker import messages
from services.worker.front.convert.inference import duration, model_info
from services.worker.front.generator import ServedModel

MAX_COMMAND_ID_CHARS = 256
MAX_PRIORITY = 100
MAX_TIMEOUT_NS = 86_400 * 10**9

_bad = InvalidRequestError.of_field

_EVICT_MODES = {
    pb.EVICT_MODE_UNSPECIFIED: messages.EvictMode.LAZY,
    pb.EVICT_MODE_LAZY: messages.EvictMode.LAZY,
    pb.EVICT_MODE_RELEASE: messages.EvictMode.RELEASE,
    pb.EVICT_MODE_SCRUB: messages.EvictMode.SCRUB,
}
_EVENTS = {
    messages.SessionEventKind.CREATED: pb.SESSION_EVENT_TYPE_CREATED,
    messages.SessionEventKind.GENERATE_STARTED: pb.SESSION_EVENT_TYPE_GENERATE_STARTED,
    messages.SessionEventKind.GENERATE_FINISHED: pb.SESSION_EVENT_TYPE_GENERATE_FINISHED,
    messages.SessionEventKind.EVICTED: pb.SESSION_EVENT_TYPE_EVICTED,
    messages.SessionEventKind.RESTORED: pb.SESSION_EVENT_TYPE_RESTORED,
    messages.SessionEventKind.DROPPED: pb.SESSION_EVENT_TYPE_DROPPED,
}


@dataclass(frozen=True, slots=True)
class WorkerIdentity:
    """Who the worker says it is.

    Attributes:
        worker_id: Its stable name.
        incarnation_id: This process.
        endpoint: host:port that clients are told.
        metrics_endpoint: host:port of its metrics.
    """

    worker_id: str
    incarnation_id: str
    endpoint: str
    metrics_endpoint: str


def hello(
    identity: WorkerIdentity,
    model: ServedModel,
    sessions: Iterable[messages.SessionState],
    *,
    draining: bool,
) -> pb.ConnectRequest:
    """Returns the first message of a control stream."""
    ready = model.ready
    return pb.ConnectRequest(
        hello=pb.Hello(
            worker_id=identity.worker_id,
            incarnation_id=identity.incarnation_id,
            advertised_endpoint=identity.endpoint,
            model=model_info(model),
            capacity=pb.WorkerCapacity(
                device_blocks=ready.device_blocks,
                host_blocks=ready.host_blocks,
                max_running_sequences=ready.max_running_sequences,
                max_step_tokens=ready.max_step_tokens,
            ),
            snapshot=map(_session, sessions),
            metrics_endpoint=identity.metrics_endpoint,
            draining=draining,
        )
    )


def set_mode(welcome: pb.Welcome) -> messages.SetMode:
    """Returns how the scheduler wants the engine to serve; if it does not say, as it was told."""
    if not welcome.HasField("mode"):
        return messages.SetMode(messages.Mode())
    mode = welcome.mode
    return messages.SetMode(
        messages.Mode(
            write_through=mode.write_through,
            offload=mode.offload,
            share_prefixes=mode.share_prefixes,
        )
    )


def command(received: pb.Command, received_ns: int) -> messages.Command:
    """Returns a command as plain data.

    Raises:
        InvalidRequestError: A field is wrong or the action is missing or unknown.
    """
    if not 1 <= len(received.command_id) <= MAX_COMMAND_ID_CHARS:
        raise _bad(
            "command_id",
            f"{len(received.command_id)} characters, 1 to {MAX_COMMAND_ID_CHARS} are allowed",
        )
    check_session_id(received.session_id)
    return messages.Command(
        command_id=received.command_id,
        session_id=received.session_id,
        action=_action(received),
        expected_generation=(
            received.expected_generation if received.HasField("expected_generation") else None
        ),
        deadline_ns=received_ns + _timeout_ns(received) if received.HasField("timeout") else None,
        scheduler_record=(
            received.scheduler_record if received.HasField("scheduler_record") else None
        ),
        received_ns=received_ns,
    )


def _action(received: pb.Command) -> messages.Action:
    match received.WhichOneof("action"):
        case "open":
            priority = _priority("open.priority", received.open.priority)
            return messages.Open(received.open.cache_salt, priority)
        case "close":
            return messages.Close()
        case "evict":
            mode = _EVICT_MODES.get(received.evict.mode)
            if mode is None:
                raise _bad("evict.mode", f"unknown mode {received.evict.mode}")
            return messages.Evict(mode, _wake("evict.expected_wake_time", received.evict))
        case "restore":
            return messages.Restore()
        case "prefetch":
            return messages.Prefetch()
        case "drop":
            return messages.Drop()
        case "set_hint":
            hint = received.set_hint
            return messages.SetHint(
                _wake("set_hint.expected_wake_time", hint),
                _priority("set_hint.priority", hint.priority)
                if hint.HasField("priority")
                else None,
            )
        case _:
            raise _bad("action", "is not set, or one that this worker does not know")


def _wake(field: str, action: pb.EvictAction | pb.SetHintAction) -> int | None:
    if not action.HasField("expected_wake_time"):
        return None
    return _nanoseconds(field, action.expected_wake_time)


def _priority(field: str, priority: int) -> int:
    if not -MAX_PRIORITY <= priority <= MAX_PRIORITY:
        raise _bad(field, f"{priority} is not from -{MAX_PRIORITY} to {MAX_PRIORITY}")
    return priority


def _timeout_ns(received: pb.Command) -> int:
    length_ns = received.timeout.ToNanoseconds()
    if not 0 < length_ns <= MAX_TIMEOUT_NS:
        raise _bad("timeout", f"{length_ns / 1e9:g} s is not above 0 and at most a day")
    return length_ns


def _nanoseconds(field: str, timestamp: Timestamp) -> int:
    try:
        return timestamp.ToNanoseconds()
    except ValueError as error:
        raise _bad(field, str(error)) from error


def ack(command_id: str) -> pb.ConnectRequest:
    """Returns the message that a command has been taken on."""
    return pb.ConnectRequest(ack=pb.CommandAck(command_id=command_id))


def result(done: messages.CommandDone) -> pb.ConnectRequest:
    """Returns the message that a command has ended."""
    copied = done.copy_end_ns > 0
    message = pb.CommandResult(
        command_id=done.command_id,
        session_id=done.session_id,
        moved_bytes=done.moved_bytes,
        moved_blocks=done.moved_blocks,
        resident_blocks=done.resident_blocks,
        copy_duration=duration(done.copy_end_ns - done.copy_start_ns),
        queue_duration=duration(
            (done.copy_start_ns if copied else done.done_ns) - done.received_ns
        ),
        generation=done.generation,
        kv=_residency(done.kv),
    )
    if done.error is not None:
        message.status.CopyFrom(status_from_error(from_info(done.error)))
    else:
        message.status.SetInParent()
    return pb.ConnectRequest(result=message)


def session_event(event: messages.SessionEvent) -> pb.ConnectRequest:
    """Returns the message that a session has changed."""
    return pb.ConnectRequest(
        session_event=pb.SessionEvent(
            type=_EVENTS[event.kind],
            session=_session(event.session),
            event_time=_timestamp(event.event_ns),
        )
    )


def memory_report(report: messages.Report, step_seconds: Sequence[float]) -> pb.ConnectRequest:
    """Returns a report as a message.

    Args:
        report: The engine's last one.
        step_seconds: Durations of the steps since the last message.
    """
    message = pb.MemoryReport(
        device=_pool(report.device),
        host=_pool(report.host),
        counters=worker_counters(report.counters),
        running_sequences=report.running_sequences,
        waiting_requests=report.waiting_requests,
        sessions=report.sessions,
        load_bytes_per_second=report.load_bytes_per_s,
        prefill_tokens_per_second=report.prefill_tokens_per_s,
        loads_in_flight=report.loads_in_flight,
        stores_in_flight=report.stores_in_flight,
    )
    if step_seconds:
        mean_ns = round(sum(step_seconds) / len(step_seconds) * 1e9)
        message.mean_step_duration.CopyFrom(duration(mean_ns))
    return pb.ConnectRequest(memory_report=message)


def worker_counters(counters: messages.Counters) -> types_pb2.WorkerCounters:
    """Returns counters as a message; the fields have the same names."""
    return types_pb2.WorkerCounters(
        **{name: getattr(counters, name) for name in counters.__struct_fields__}
    )


def _session(state: messages.SessionState) -> pb.SessionSnapshot:
    return pb.SessionSnapshot(
        session_id=state.session_id,
        generation=state.generation,
        context_length=state.context_length,
        kv=_residency(state.kv),
        generating=state.generating,
        scheduler_record=state.scheduler_record,
        last_generate_time=(
            None if state.last_generate_ns is None else _timestamp(state.last_generate_ns)
        ),
    )


def _residency(kv: messages.Residency) -> types_pb2.KvResidency:
    return types_pb2.KvResidency(
        total_blocks=kv.total_blocks,
        device_blocks=kv.device_blocks,
        host_blocks=kv.host_blocks,
        missing_tokens=kv.missing_tokens,
        resident=kv.resident,
    )


def _pool(pool: messages.PoolState) -> types_pb2.PoolReport:
    return types_pb2.PoolReport(
        total_blocks=pool.total,
        free_blocks=pool.free,
        used_blocks=pool.used,
        reclaimable_blocks=pool.reclaimable,
        in_flight_blocks=pool.in_flight,
    )


def _timestamp(nanoseconds: int) -> Timestamp:
    message = Timestamp()
    message.FromNanoseconds(nanoseconds)
    return message
