"""WorkerControlService: what workers say, in; commands, out."""

from __future__ import annotations

from djinn.v1 import control_service_pb2 as control_pb
from djinn.v1 import types_pb2 as types_pb
from services.common.errors import InvalidRequestError
from services.common.session_token import check_session_id
from services.common.status import error_from_status
from services.scheduler.convert.times import to_duration, to_seconds, to_timestamp
from services.scheduler.domain import (
    Action,
    Capacity,
    Close,
    Command,
    CommandResult,
    Counters,
    Drop,
    EventKind,
    Evict,
    EvictMode,
    Hello,
    ModelInfo,
    Open,
    PoolState,
    Prefetch,
    Report,
    Residency,
    Restore,
    SessionEvent,
    SessionSnapshot,
    SetHint,
    WorkerMode,
)

_EVENTS = {
    control_pb.SESSION_EVENT_TYPE_CREATED: EventKind.CREATED,
    control_pb.SESSION_EVENT_TYPE_GENERATE_STARTED: EventKind.GENERATE_STARTED,
    control_pb.SESSION_EVENT_TYPE_GENERATE_FINISHED: EventKind.GENERATE_FINISHED,
    control_pb.SESSION_EVENT_TYPE_EVICTED: EventKind.EVICTED,
    control_pb.SESSION_EVENT_TYPE_RESTORED: EventKind.RESTORED,
    control_pb.SESSION_EVENT_TYPE_DROPPED: EventKind.DROPPED,
}

_COUNTERS = tuple(column.name for column in types_pb.WorkerCounters.DESCRIPTOR.fields)


# --- upwards ---


def hello(message: control_pb.Hello) -> Hello:
    """Returns a worker's Hello.

    Raises:
        InvalidRequestError: It lacks who the worker is or where.
    """
    try:
        check_session_id(message.worker_id)
    except InvalidRequestError:
        raise InvalidRequestError.of_field(
            "worker_id",
            f"{message.worker_id[:40]!r} is not 1 to 128 characters of [A-Za-z0-9._:-]",
        ) from None
    for name in ("incarnation_id", "advertised_endpoint"):
        if not getattr(message, name):
            raise InvalidRequestError.of_field(name, "is empty")
    model = message.model
    capacity = message.capacity
    return Hello(
        worker_id=message.worker_id,
        incarnation_id=message.incarnation_id,
        endpoint=message.advertised_endpoint,
        model=ModelInfo(
            model=model.model,
            vocab_size=model.vocab_size,
            max_context_length=model.max_context_length,
            eos_token_ids=tuple(model.eos_token_ids),
            block_size_tokens=model.block_size_tokens,
            block_bytes=model.block_bytes,
            dtype=model.dtype,
            has_tokenizer=model.has_tokenizer,
            has_chat_template=model.has_chat_template,
        ),
        capacity=Capacity(
            device_blocks=capacity.device_blocks,
            host_blocks=capacity.host_blocks,
            max_running_sequences=capacity.max_running_sequences,
            max_step_tokens=capacity.max_step_tokens,
        ),
        snapshot=tuple(_snapshot(item) for item in message.snapshot),
        metrics_endpoint=message.metrics_endpoint,
        draining=message.draining,
    )


def result(message: control_pb.CommandResult) -> CommandResult:
    """Returns how a command ended."""
    code, reason, text = "OK", "", ""
    if message.status.code:
        error = error_from_status(message.status)
        code, reason, text = error.code, error.reason, error.message
    return CommandResult(
        command_id=message.command_id,
        session_id=message.session_id,
        code=code,
        reason=reason,
        message=text,
        moved_bytes=message.moved_bytes,
        moved_blocks=message.moved_blocks,
        resident_blocks=message.resident_blocks,
        copy_s=to_seconds(message.copy_duration),
        queue_s=to_seconds(message.queue_duration),
        generation=message.generation,
        kv=_residency(message.kv) if message.HasField("kv") else None,
    )


def event(message: control_pb.SessionEvent) -> SessionEvent | None:
    """Returns what happened to a session; None if this version does not know the kind."""
    kind = _EVENTS.get(message.type)
    if kind is None:
        return None
    stamp = message.event_time
    return SessionEvent(kind, _snapshot(message.session), stamp.seconds + stamp.nanos / 1e9)


def report(message: control_pb.MemoryReport) -> Report:
    """Returns a worker's report."""
    has_step = message.HasField("mean_step_duration")
    return Report(
        device=_pool(message.device),
        host=_pool(message.host),
        counters=_counters(message.counters),
        running_sequences=message.running_sequences,
        waiting_requests=message.waiting_requests,
        sessions=message.sessions,
        mean_step_s=to_seconds(message.mean_step_duration) if has_step else None,
        load_bytes_per_s=message.load_bytes_per_second,
        prefill_tokens_per_s=message.prefill_tokens_per_second,
        loads_in_flight=message.loads_in_flight,
        stores_in_flight=message.stores_in_flight,
    )


# --- downwards ---


def to_command(command: Command, now_s: float) -> control_pb.ConnectResponse:
    """Returns a command as it goes down a worker's stream at `now_s`."""
    message = control_pb.Command(
        command_id=command.command_id,
        session_id=command.session_id,
        expected_generation=command.expected_generation,
        traceparent=command.traceparent,
        scheduler_record=command.record,
    )
    if command.deadline_s is not None:
        # The worker's clock need not be this one: it is told how long it has, not until when.
        message.timeout.CopyFrom(to_duration(command.deadline_s - now_s))
    _set_action(message, command.action)
    return control_pb.ConnectResponse(command=message)


def to_welcome(
    epoch: str, report_interval_s: float, mode: WorkerMode
) -> control_pb.ConnectResponse:
    """Returns the answer to a Hello."""
    return control_pb.ConnectResponse(
        welcome=control_pb.Welcome(
            scheduler_epoch=epoch,
            report_interval=to_duration(report_interval_s),
            mode=control_pb.WorkerMode(
                write_through=mode.write_through,
                offload=mode.offload,
                share_prefixes=mode.share_prefixes,
            ),
        )
    )


def _set_action(message: control_pb.Command, action: Action) -> None:
    match action:
        case Open(cache_salt, priority):
            message.open.CopyFrom(control_pb.OpenAction(cache_salt=cache_salt, priority=priority))
        case Close():
            message.close.SetInParent()
        case Evict(mode, expected_wake_s):
            message.evict.mode = _TO_MODE[mode]
            if expected_wake_s is not None:
                message.evict.expected_wake_time.CopyFrom(to_timestamp(expected_wake_s))
        case Restore():
            message.restore.SetInParent()
        case Prefetch():
            message.prefetch.SetInParent()
        case Drop():
            message.drop.SetInParent()
        case SetHint(expected_wake_s, priority_hint):
            message.set_hint.SetInParent()
            if expected_wake_s is not None:
                message.set_hint.expected_wake_time.CopyFrom(to_timestamp(expected_wake_s))
            if priority_hint is not None:
                message.set_hint.priority = priority_hint


_TO_MODE: dict[EvictMode, control_pb.EvictMode.ValueType] = {
    EvictMode.LAZY: control_pb.EVICT_MODE_LAZY,
    EvictMode.RELEASE: control_pb.EVICT_MODE_RELEASE,
    EvictMode.SCRUB: control_pb.EVICT_MODE_SCRUB,
}


# --- parts ---


def _counters(message: types_pb.WorkerCounters) -> Counters:
    return Counters(**{name: getattr(message, name) for name in _COUNTERS})


def _pool(message: types_pb.PoolReport) -> PoolState:
    return PoolState(
        total=message.total_blocks,
        free=message.free_blocks,
        used=message.used_blocks,
        reclaimable=message.reclaimable_blocks,
        in_flight=message.in_flight_blocks,
    )


def _residency(message: types_pb.KvResidency) -> Residency:
    return Residency(
        message.total_blocks,
        message.device_blocks,
        message.host_blocks,
        message.missing_tokens,
        message.resident,
    )


def _snapshot(message: control_pb.SessionSnapshot) -> SessionSnapshot:
    stamp = message.last_generate_time
    return SessionSnapshot(
        session_id=message.session_id,
        generation=message.generation,
        context_length=message.context_length,
        kv=_residency(message.kv),
        generating=message.generating,
        record=message.scheduler_record,
        last_generate_s=(
            stamp.seconds + stamp.nanos / 1e9 if message.HasField("last_generate_time") else None
        ),
    )
