"""Between protobuf messages and the client's own types."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from typing import Final, cast

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from djinn.v1 import (
    admin_service_pb2,
    control_service_pb2,
    inference_service_pb2,
    types_pb2,
)
from djinn_client._errors import InvalidRequestError, error_from_status
from djinn_client._types import (
    CommandOutcome,
    Counters,
    EvictMode,
    FinishReason,
    KvResidency,
    KvSource,
    ModelInfo,
    Phase,
    Piece,
    PoolInfo,
    PositionLogprobs,
    Prompt,
    SessionInfo,
    Stats,
    TokenLogprob,
    Turn,
    WorkerInfo,
)

_PHASE_FROM_PROTO: Final = {
    types_pb2.AGENT_PHASE_OPEN: Phase.OPEN,
    types_pb2.AGENT_PHASE_COMPUTE: Phase.COMPUTE,
    types_pb2.AGENT_PHASE_IO_WAIT: Phase.IO_WAIT,
    types_pb2.AGENT_PHASE_CLOSED: Phase.CLOSED,
}
_PHASE_TO_PROTO: Final = {phase: value for value, phase in _PHASE_FROM_PROTO.items()}

_EVICT_MODES: Final = {
    EvictMode.LAZY: control_service_pb2.EVICT_MODE_LAZY,
    EvictMode.RELEASE: control_service_pb2.EVICT_MODE_RELEASE,
    EvictMode.SCRUB: control_service_pb2.EVICT_MODE_SCRUB,
}

_FINISH_REASONS: Final = {
    inference_service_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    inference_service_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
}


# --- to the servers ------------------------------------------------------------------------------


def signal_phase_of(phase: Phase | str) -> Phase:
    """Returns the phase meant by a signal.

    Raises:
        InvalidRequestError: It is not one that can be signalled.
    """
    if phase not in {Phase.COMPUTE, Phase.IO_WAIT}:
        raise InvalidRequestError.of_field("phase", f"{phase!s:.64}: only COMPUTE or IO_WAIT")
    return Phase(phase)


def phase_to_proto(phase: Phase) -> types_pb2.AgentPhase.ValueType:
    """Returns a phase as the protocol's number."""
    return _PHASE_TO_PROTO[phase]


def evict_mode_to_proto(mode: EvictMode | str) -> control_service_pb2.EvictMode.ValueType:
    """Returns an eviction mode as the protocol's number.

    Raises:
        InvalidRequestError: There is no such mode.
    """
    try:
        return _EVICT_MODES[EvictMode(mode)]
    except ValueError:
        allowed = ", ".join(EvictMode)
        raise InvalidRequestError.of_field("mode", f"{mode!r} is none of {allowed}") from None


def duration_to_proto(seconds: float) -> Duration:
    """Returns seconds as a protobuf duration, rounded to nanoseconds."""
    whole, nanos = divmod(round(seconds * 1e9), 1_000_000_000)
    return Duration(seconds=whole, nanos=nanos)


def token_ids_to_proto(field: str, ids: Sequence[object]) -> inference_service_pb2.TokenIds:
    """Returns token ids as a message.

    Raises:
        InvalidRequestError: One of them is not a 32-bit integer; the worker checks the vocabulary.
    """
    try:
        # Whole sequences of integers, numpy's included, are taken at once; the check is protobuf's.
        return inference_service_pb2.TokenIds(ids=cast(Sequence[int], ids))
    except (TypeError, ValueError) as error:
        raise InvalidRequestError.of_field(field, f"not token ids: {error}") from None


def set_append(request: inference_service_pb2.GenerateRequest, prompt: Prompt | None) -> None:
    """Fills the request's `append` from a prompt.

    Raises:
        InvalidRequestError: The prompt is none of text, turns or token ids.
    """
    if prompt is None:
        return
    if isinstance(prompt, str):
        try:
            request.append_text = prompt
        except ValueError as error:  # a lone surrogate, which UTF-8 has no bytes for
            raise InvalidRequestError.of_field("append_text", str(error)) from None
        return
    try:
        parts: list[object] = [prompt] if isinstance(prompt, Turn) else list(prompt)
    except TypeError:
        problem = f"{prompt!r:.64} is neither text, turns nor token ids"
        raise InvalidRequestError.of_field("prompt", problem) from None
    turns = [part for part in parts if isinstance(part, Turn)]
    if not turns:
        ids = token_ids_to_proto("append_token_ids", parts)
        request.append_token_ids.CopyFrom(ids)
    elif len(turns) == len(parts):
        try:
            request.append_chat.turns.extend(
                inference_service_pb2.ChatTurn(role=turn.role, content=turn.content)
                for turn in turns
            )
        except (TypeError, ValueError) as error:
            raise InvalidRequestError.of_field("append_chat", str(error)) from None
    else:
        raise InvalidRequestError.of_field("prompt", "mixes turns with token ids")


# --- from the servers ----------------------------------------------------------------------------


def seconds_of(duration: Duration) -> float:
    """Returns a protobuf duration in seconds."""
    return duration.seconds + duration.nanos / 1e9


def _time_of(message: Message, field: str) -> dt.datetime | None:
    if not message.HasField(field):
        return None
    value: Timestamp = getattr(message, field)
    return value.ToDatetime(dt.UTC)


def _epoch_seconds_of(message: Message, field: str) -> float | None:
    time = _time_of(message, field)
    return None if time is None else time.timestamp()


def phase_from_proto(value: types_pb2.AgentPhase.ValueType) -> Phase:
    """Returns the protocol's number as a phase; one newer than this client counts as OPEN."""
    return _PHASE_FROM_PROTO.get(value, Phase.OPEN)


def piece_from_proto(delta: inference_service_pb2.GenerateDelta) -> Piece:
    """Returns a delta as a piece."""
    return Piece(
        text=delta.text,
        token_ids=tuple(delta.token_ids),
        logprobs=tuple(
            PositionLogprobs(
                TokenLogprob(position.chosen.token_id, position.chosen.logprob),
                tuple(TokenLogprob(top.token_id, top.logprob) for top in position.top),
            )
            for position in delta.logprobs
        ),
        logits=tuple(delta.logits),
    )


def finish_reason_from_proto(reason: inference_service_pb2.FinishReason.ValueType) -> FinishReason:
    """Returns why a generation ended; a reason newer than this client counts as STOP."""
    return _FINISH_REASONS.get(reason, FinishReason.STOP)


def kv_source_from_proto(kv: inference_service_pb2.KvSource) -> KvSource:
    """Returns where a generation's KV came from."""
    return KvSource(
        held_blocks=kv.held_blocks,
        resident_blocks=kv.resident_blocks,
        loaded_blocks=kv.loaded_blocks,
        loaded_bytes=kv.loaded_bytes,
        recomputed_tokens=kv.recomputed_tokens,
        load_s=seconds_of(kv.load_duration),
        prefix_hit_tokens=kv.prefix_hit_tokens,
    )


def residency_from_proto(kv: types_pb2.KvResidency) -> KvResidency:
    """Returns where a session's KV lies."""
    return KvResidency(
        total_blocks=kv.total_blocks,
        device_blocks=kv.device_blocks,
        host_blocks=kv.host_blocks,
        missing_tokens=kv.missing_tokens,
        resident=kv.resident,
    )


def session_from_proto(session: types_pb2.Session) -> SessionInfo:
    """Returns one session as the scheduler knows it."""
    return SessionInfo(
        session_id=session.session_id,
        name=session.name,
        tenant=session.tenant_id,
        priority=session.priority,
        phase=phase_from_proto(session.phase),
        phase_sequence=session.phase_sequence,
        open_time=_time_of(session, "open_time"),
        phase_time=_time_of(session, "phase_time"),
        tool_name=session.tool_name,
        expected_wake_time=_time_of(session, "expected_wake_time"),
        expire_time=_time_of(session, "expire_time"),
        worker_id=session.worker_id,
        worker_endpoint=session.worker_endpoint,
        context_length=session.context_length,
        generation=session.generation,
        kv=residency_from_proto(session.kv),
    )


def model_from_proto(model: types_pb2.ModelInfo) -> ModelInfo:
    """Returns what a worker serves."""
    return ModelInfo(
        model=model.model,
        vocab_size=model.vocab_size,
        max_context_length=model.max_context_length,
        eos_token_ids=tuple(model.eos_token_ids),
        block_size_tokens=model.block_size_tokens,
        block_bytes=model.block_bytes,
        dtype=model.dtype,
        has_tokenizer=model.has_tokenizer,
        has_chat_template=model.has_chat_template,
    )


def _pool_from_proto(pool: types_pb2.PoolReport) -> PoolInfo:
    return PoolInfo(
        total_blocks=pool.total_blocks,
        free_blocks=pool.free_blocks,
        used_blocks=pool.used_blocks,
        reclaimable_blocks=pool.reclaimable_blocks,
        in_flight_blocks=pool.in_flight_blocks,
    )


def _counters_from_proto(counters: types_pb2.WorkerCounters) -> Counters:
    return Counters(**{name: getattr(counters, name) for name in Counters.__dataclass_fields__})


def worker_from_proto(worker: admin_service_pb2.Worker) -> WorkerInfo:
    """Returns a connected worker."""
    return WorkerInfo(
        worker_id=worker.worker_id,
        incarnation_id=worker.incarnation_id,
        endpoint=worker.endpoint,
        model=model_from_proto(worker.model),
        device_blocks=worker.capacity.device_blocks,
        host_blocks=worker.capacity.host_blocks,
        max_running_sequences=worker.capacity.max_running_sequences,
        max_step_tokens=worker.capacity.max_step_tokens,
        device=_pool_from_proto(worker.report.device),
        host=_pool_from_proto(worker.report.host),
        counters=_counters_from_proto(worker.report.counters),
        draining=worker.draining,
        sessions=worker.sessions,
    )


def outcome_from_proto(result: control_service_pb2.CommandResult) -> CommandOutcome:
    """Returns what a worker did.

    Raises:
        DjinnError: The command failed.
    """
    if result.status.code != 0:
        raise error_from_status(result.status)
    return CommandOutcome(
        moved_bytes=result.moved_bytes,
        moved_blocks=result.moved_blocks,
        resident_blocks=result.resident_blocks,
        copy_s=seconds_of(result.copy_duration),
        queue_s=seconds_of(result.queue_duration),
        generation=result.generation,
        kv=residency_from_proto(result.kv),
    )


def stats_from_proto(stats: admin_service_pb2.GetStatsResponse) -> Stats:
    """Returns what the system has done."""
    return Stats(
        counters=_counters_from_proto(stats.counters),
        phases={
            _PHASE_FROM_PROTO[entry.phase]: entry.sessions
            for entry in stats.phases
            if entry.phase in _PHASE_FROM_PROTO
        },
        policy=stats.policy,
        uptime_s=seconds_of(stats.uptime),
        report_time_s=_epoch_seconds_of(stats, "report_time"),
        answer_time_s=_epoch_seconds_of(stats, "answer_time"),
        device=_pool_from_proto(stats.device),
        host=_pool_from_proto(stats.host),
    )
