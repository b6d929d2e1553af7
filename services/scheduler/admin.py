"""AdminService: what operators and verification tools call."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
from opentelemetry import trace

from djinn.v1 import admin_service_pb2 as pb
from djinn.v1 import admin_service_pb2_grpc as pb_grpc
from services.common.errors import CommandTimeoutError, ErrorInfo, from_info
from services.common.session_token import check_session_id
from services.common.telemetry import traceparent_of
from services.scheduler.convert import operators as convert
from services.scheduler.convert.agents import to_phase, to_session
from services.scheduler.convert.times import to_duration, to_timestamp
from services.scheduler.coordinator import Coordinator
from services.scheduler.domain import (
    Action,
    CommandResult,
    Drop,
    Evict,
    Phase,
    Restore,
    name_of,
)

add_to_server = pb_grpc.add_AdminServiceServicer_to_server


class AdminService(pb_grpc.AdminServiceServicer):
    """Serves operators.

    Args:
        coordinator: What carries their wishes out.
        clock: The time.
        tracer: Makes the spans.
        on_change: Called after each change, for whoever keeps the timers.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        clock: Callable[[], float],
        tracer: trace.Tracer,
        *,
        on_change: Callable[[], None],
    ) -> None:
        self._coordinator = coordinator
        self._clock = clock
        self._tracer = tracer
        self._on_change = on_change

    async def ListWorkers(
        self, request: pb.ListWorkersRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.ListWorkersResponse:
        """Lists the connected workers."""
        del request, context
        workers = [worker for worker in self._coordinator.registry if worker.link is not None]
        workers.sort(key=lambda worker: worker.hello.worker_id)
        return pb.ListWorkersResponse(workers=[convert.to_worker(worker) for worker in workers])

    async def EvictSession(
        self, request: pb.EvictSessionRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.EvictSessionResponse:
        """Evicts a session and waits for it."""
        action = Evict(convert.evict_mode(request.mode))
        result = await self._command(request.session_id, action, context.time_remaining())
        return pb.EvictSessionResponse(result=convert.to_result(result))

    async def RestoreSession(
        self, request: pb.RestoreSessionRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.RestoreSessionResponse:
        """Restores a session and waits for it."""
        result = await self._command(request.session_id, Restore(), context.time_remaining())
        return pb.RestoreSessionResponse(result=convert.to_result(result))

    async def DropSession(
        self, request: pb.DropSessionRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.DropSessionResponse:
        """Drops a session to its tokens and waits for it."""
        result = await self._command(request.session_id, Drop(), context.time_remaining())
        return pb.DropSessionResponse(result=convert.to_result(result))

    async def ExplainSession(
        self, request: pb.ExplainSessionRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.ExplainSessionResponse:
        """Says why a session's KV is where it is."""
        del context
        check_session_id(request.session_id)
        coordinator = self._coordinator
        session = coordinator.get_session(request.session_id, self._clock())
        self._on_change()
        found = coordinator.explain(session, self._clock())
        costs, forecast = convert.to_explanation(found) if found else (None, None)
        return pb.ExplainSessionResponse(
            session=to_session(session, coordinator.dispatcher.endpoint(session)),
            policy=coordinator.policy.name,
            reason=session.reason,
            costs=costs,
            forecast=forecast,
        )

    async def DrainWorker(
        self, request: pb.DrainWorkerRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.DrainWorkerResponse:
        """Stops placing sessions on a worker, or starts again."""
        del context
        worker = self._coordinator.drain_worker(request.worker_id, not request.resume)
        return pb.DrainWorkerResponse(worker=convert.to_worker(worker))

    async def GetStats(
        self, request: pb.GetStatsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.GetStatsResponse:
        """Returns what the system has done."""
        del request, context
        coordinator = self._coordinator
        device, host = coordinator.registry.pools()
        report_s = coordinator.registry.report_time_s()
        now_s = self._clock()
        return pb.GetStatsResponse(
            counters=convert.to_counters(coordinator.registry.totals()),
            phases=[
                pb.PhaseCount(phase=to_phase(phase), sessions=coordinator.store.count(phase))
                for phase in (Phase.OPEN, Phase.COMPUTE, Phase.IO_WAIT)
            ],
            policy=coordinator.policy.name,
            uptime=to_duration(now_s - coordinator.start_s),
            device=convert.to_pool(device),
            host=convert.to_pool(host),
            report_time=None if report_s is None else to_timestamp(report_s),
            answer_time=to_timestamp(now_s),
        )

    async def _command(
        self, session_id: str, action: Action, time_left_s: float | None
    ) -> CommandResult:
        """Sends a command and returns its result.

        Raises:
            CommandTimeoutError: The caller's deadline is near and there is no result yet.
            DjinnError: As the worker's command failed.
        """
        check_session_id(session_id)
        done: asyncio.Future[CommandResult] = asyncio.get_running_loop().create_future()

        def on_done(result: CommandResult) -> None:
            if not done.done():
                done.set_result(result)

        with self._tracer.start_as_current_span(f"admin.{name_of(action)}") as span:
            span.set_attribute("gen_ai.conversation.id", session_id)
            self._coordinator.command(
                session_id,
                action,
                on_done,
                self._clock(),
                traceparent=traceparent_of(trace.set_span_in_context(span)),
            )
            self._on_change()
            try:
                async with asyncio.timeout(None if time_left_s is None else time_left_s * 0.9):
                    result = await done
            except TimeoutError:
                raise CommandTimeoutError(
                    f"{name_of(action)} of session {session_id!r} is not done yet"
                ) from None
        if not result.ok:
            raise from_info(ErrorInfo(result.code, result.reason, result.message))
        return result
