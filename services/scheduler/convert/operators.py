"""AdminService: what operators are told."""

from __future__ import annotations

from google.rpc import status_pb2

from djinn.v1 import admin_service_pb2 as admin_pb
from djinn.v1 import control_service_pb2 as control_pb
from djinn.v1 import types_pb2 as types_pb
from services.common.errors import InvalidRequestError
from services.scheduler.convert.times import to_duration
from services.scheduler.domain import CommandResult, Counters, EvictMode, PoolState, Report
from services.scheduler.policy.cost import Choice
from services.scheduler.policy.explanation import Explanation
from services.scheduler.registry import WorkerState

_COUNTERS = tuple(column.name for column in types_pb.WorkerCounters.DESCRIPTOR.fields)


def evict_mode(value: int) -> EvictMode:
    """Returns how to evict; lazily if unspecified.

    Raises:
        InvalidRequestError: There is no such mode.
    """
    if value == control_pb.EVICT_MODE_UNSPECIFIED:
        return EvictMode.LAZY
    try:
        return EvictMode(value)
    except ValueError:
        raise InvalidRequestError.of_field("mode", f"{value} is no eviction mode") from None


def to_result(outcome: CommandResult) -> control_pb.CommandResult:
    """Returns how a command ended well, for an operator."""
    return control_pb.CommandResult(
        command_id=outcome.command_id,
        session_id=outcome.session_id,
        status=status_pb2.Status(),
        moved_bytes=outcome.moved_bytes,
        moved_blocks=outcome.moved_blocks,
        resident_blocks=outcome.resident_blocks,
        copy_duration=to_duration(outcome.copy_s),
        queue_duration=to_duration(outcome.queue_s),
        generation=outcome.generation,
        kv=types_pb.KvResidency(**outcome.kv._asdict()) if outcome.kv is not None else None,
    )


def to_explanation(found: Explanation) -> tuple[admin_pb.DecisionCosts, admin_pb.WakeForecast]:
    """Returns the numbers behind a decision for an operator."""
    costs = found.costs
    return (
        admin_pb.DecisionCosts(
            best=_TO_CHOICE[costs.best],
            keep_seconds=costs.keep_s,
            evict_seconds=costs.evict_s,
            drop_seconds=costs.drop_s,
            load_seconds=costs.load_s,
            prefill_seconds=costs.prefill_s,
            device_pressure=costs.device_pressure,
            host_pressure=costs.host_pressure,
            middle_seconds=costs.middle_s,
            measured=costs.measured,
        ),
        admin_pb.WakeForecast(
            source=found.source,
            waited_seconds=found.waited_s,
            remaining_seconds=costs.remaining_s,
            early_seconds=found.early_s,
            median_seconds=found.median_s,
            late_seconds=found.late_s,
        ),
    )


_TO_CHOICE: dict[Choice, admin_pb.KvChoice.ValueType] = {
    Choice.KEEP: admin_pb.KV_CHOICE_KEEP,
    Choice.EVICT: admin_pb.KV_CHOICE_EVICT,
    Choice.DROP: admin_pb.KV_CHOICE_DROP,
}


def to_worker(worker: WorkerState) -> admin_pb.Worker:
    """Returns a connected worker for an operator."""
    info = worker.hello
    model = info.model
    message = admin_pb.Worker(
        worker_id=info.worker_id,
        incarnation_id=info.incarnation_id,
        endpoint=info.endpoint,
        model=types_pb.ModelInfo(
            model=model.model,
            vocab_size=model.vocab_size,
            max_context_length=model.max_context_length,
            eos_token_ids=model.eos_token_ids,
            block_size_tokens=model.block_size_tokens,
            block_bytes=model.block_bytes,
            dtype=model.dtype,
            has_tokenizer=model.has_tokenizer,
            has_chat_template=model.has_chat_template,
        ),
        capacity=control_pb.WorkerCapacity(
            device_blocks=info.capacity.device_blocks,
            host_blocks=info.capacity.host_blocks,
            max_running_sequences=info.capacity.max_running_sequences,
            max_step_tokens=info.capacity.max_step_tokens,
        ),
        draining=worker.draining,
        sessions=len(worker.sessions),
    )
    if worker.report is not None:
        message.report.CopyFrom(_to_report(worker.report))
    return message


def to_counters(counters: Counters) -> types_pb.WorkerCounters:
    """Returns counters for an operator."""
    return types_pb.WorkerCounters(**{name: getattr(counters, name) for name in _COUNTERS})


def to_pool(pool: PoolState) -> types_pb.PoolReport:
    """Returns a pool for an operator."""
    return types_pb.PoolReport(
        total_blocks=pool.total,
        free_blocks=pool.free,
        used_blocks=pool.used,
        reclaimable_blocks=pool.reclaimable,
        in_flight_blocks=pool.in_flight,
    )


def _to_report(told: Report) -> control_pb.MemoryReport:
    message = control_pb.MemoryReport(
        device=to_pool(told.device),
        host=to_pool(told.host),
        counters=to_counters(told.counters),
        running_sequences=told.running_sequences,
        waiting_requests=told.waiting_requests,
        sessions=told.sessions,
        load_bytes_per_second=told.load_bytes_per_s,
        prefill_tokens_per_second=told.prefill_tokens_per_s,
        loads_in_flight=told.loads_in_flight,
        stores_in_flight=told.stores_in_flight,
    )
    if told.mean_step_s is not None:
        message.mean_step_duration.CopyFrom(to_duration(told.mean_step_s))
    return message
