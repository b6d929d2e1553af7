"""AgentService: what agents call. It checks, converts, traces, and hands on."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from opentelemetry import trace
from opentelemetry.context import Context

from djinn.v1 import agent_service_pb2 as pb
from djinn.v1 import agent_service_pb2_grpc as pb_grpc
from services.common.errors import (
    DjinnError,
    DrainingError,
    InvalidRequestError,
    NoWorkerError,
    UnsupportedError,
)
from services.common.session_token import check_session_id
from services.common.status import status_from_error
from services.common.telemetry import context_from_traceparent, traceparent_of
from services.scheduler.convert import agents as convert
from services.scheduler.coordinator import Coordinator, OpenRequest, SignalOutcome
from services.scheduler.domain import name_of
from services.scheduler.metrics import Metrics
from services.scheduler.session import ClientStream, Session

add_to_server = pb_grpc.add_AgentServiceServicer_to_server

MAX_PAGE = 1000
DEFAULT_PAGE = 100


class WorkerArrivals:
    """Lets calls wait until a worker connects."""

    def __init__(self) -> None:
        self._waiting: set[asyncio.Future[None]] = set()

    def notify(self) -> None:
        """Wakes every call that waits."""
        for future in self._waiting:
            if not future.done():
                future.set_result(None)

    async def wait(self, timeout_s: float) -> bool:
        """Waits for a worker to connect; returns whether one did in time."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.add(future)
        try:
            async with asyncio.timeout(timeout_s):
                await future
        except TimeoutError:
            return False
        finally:
            self._waiting.discard(future)
        return True


class AgentService(pb_grpc.AgentServiceServicer):
    """Serves agents.

    Args:
        coordinator: What acts on what they say.
        clock: The time.
        tracer: Makes the spans.
        metrics: Counts signals.
        arrivals: Tells when a worker connects.
        on_change: Called after each change, for whoever keeps the timers.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        clock: Callable[[], float],
        tracer: trace.Tracer,
        metrics: Metrics,
        arrivals: WorkerArrivals,
        *,
        on_change: Callable[[], None],
    ) -> None:
        self._coordinator = coordinator
        self._clock = clock
        self._tracer = tracer
        self._metrics = metrics
        self._arrivals = arrivals
        self._on_change = on_change
        self._streams: set[asyncio.Task[Any]] = set()

    async def OpenSession(
        self, request: pb.OpenSessionRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.OpenSessionResponse:
        """Opens a session, waiting a little for a worker if there is none."""
        wanted = convert.open_request(request)
        with self._tracer.start_as_current_span("open_session") as span:
            session = await self._open(wanted, context.time_remaining())
            session.heard_s = self._clock()
            span.set_attribute("gen_ai.conversation.id", session.session_id)
            span.set_attribute("djinn.worker.id", session.worker_id)
        self._on_change()
        return pb.OpenSessionResponse(
            session=self._message(session),
            session_token=self._coordinator.token(session),
            scheduler_epoch=self._coordinator.epoch,
        )

    async def SignalPhase(
        self, request: pb.SignalPhaseRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.SignalPhaseResponse:
        """Takes one signal in."""
        del context
        return self._signal(request, None, None)

    async def StreamPhases(
        self,
        request_iterator: AsyncIterator[pb.StreamPhasesRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[pb.StreamPhasesResponse]:
        """Takes signals in and answers each."""
        del context
        task = asyncio.current_task()
        assert task is not None, "a coroutine runs in a task"
        self._streams.add(task)
        stream = ClientStream()
        try:
            async for request in request_iterator:
                yield self._answer(request, stream)
        except asyncio.CancelledError:
            if not self._coordinator.draining:
                raise
            task.uncancel()
            raise DrainingError("the scheduler is about to stop", retry_after_s=1.0) from None
        finally:
            stream.ended_s = self._clock()
            self._streams.discard(task)

    async def CloseSession(
        self, request: pb.CloseSessionRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.CloseSessionResponse:
        """Ends a session."""
        del context
        check_session_id(request.session_id)
        self._coordinator.close_session(request.session_id, self._clock())
        self._on_change()
        return pb.CloseSessionResponse()

    async def GetSession(
        self, request: pb.GetSessionRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.GetSessionResponse:
        """Returns one session."""
        del context
        check_session_id(request.session_id)
        session = self._coordinator.get_session(request.session_id, self._clock())
        self._on_change()
        return pb.GetSessionResponse(session=self._message(session))

    async def ListSessions(
        self, request: pb.ListSessionsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.ListSessionsResponse:
        """Lists a page of sessions."""
        del context
        if not 0 <= request.page_size <= MAX_PAGE:
            raise InvalidRequestError.of_field(
                "page_size", f"{request.page_size} is not from 1 to {MAX_PAGE}"
            )
        sessions, more = self._coordinator.store.page(
            _decode_page(request.page_token),
            request.page_size or DEFAULT_PAGE,
            request.tenant_id if request.HasField("tenant_id") else None,
            convert.phase_filter(request.phase),
        )
        return pb.ListSessionsResponse(
            sessions=[self._message(session) for session in sessions],
            next_page_token=_encode_page(sessions[-1].session_id) if more else "",
        )

    def close(self) -> None:
        """Ends every stream of signals."""
        for task in list(self._streams):
            task.cancel()

    def _answer(
        self, request: pb.StreamPhasesRequest, stream: ClientStream
    ) -> pb.StreamPhasesResponse:
        signal = request.signal
        response = pb.StreamPhasesResponse(session_id=signal.session_id, sequence=signal.sequence)
        told = request.traceparent
        parent = context_from_traceparent(told) if told else None
        try:
            response.response.CopyFrom(self._signal(signal, parent, stream))
        except DjinnError as error:
            response.error.CopyFrom(status_from_error(error))
        return response

    async def _open(self, wanted: OpenRequest, time_left_s: float | None) -> Session:
        config = self._coordinator.config
        wait_s = config.worker_wait_s
        if time_left_s is not None:
            # So that the client gets the reason rather than its own deadline.
            wait_s = min(wait_s, time_left_s * 0.8)
        give_up_s = self._clock() + wait_s
        while True:
            now_s = self._clock()
            try:
                return self._coordinator.open_session(wanted, now_s)
            except (NoWorkerError, UnsupportedError):
                # Just after its own start not all workers have found it yet.
                starting = now_s < self._coordinator.start_s + config.worker_wait_s
                alone = not self._coordinator.registry.views
                if now_s >= give_up_s or not (starting or alone):
                    raise
            await self._arrivals.wait(give_up_s - now_s)

    def _signal(
        self,
        request: pb.SignalPhaseRequest,
        parent: Context | None,
        stream: ClientStream | None,
    ) -> pb.SignalPhaseResponse:
        received_s = self._clock()
        with self._tracer.start_as_current_span(
            "signal_phase", context=parent, kind=trace.SpanKind.SERVER
        ) as span:
            span.set_attribute("gen_ai.conversation.id", request.session_id)
            try:
                outcome = self._decide(request, received_s)
            except DjinnError as error:
                self._metrics.signal_refused(error.reason)
                span.set_attribute("error.type", error.reason)
                raise
            if stream is not None:
                outcome.session.stream = stream
            phase = outcome.session.phase
            span.set_attribute("djinn.phase", phase.name)
            span.set_attribute("djinn.signal.ignored", not outcome.transition.applied)
        self._metrics.signal_taken(phase, outcome.transition.applied)
        self._on_change()
        return pb.SignalPhaseResponse(
            phase=convert.to_phase(phase),
            sequence=outcome.session.sequence,
            ignored=not outcome.transition.applied,
            scheduler_epoch=self._coordinator.epoch,
            worker_endpoint=outcome.endpoint,
        )

    def _decide(self, request: pb.SignalPhaseRequest, received_s: float) -> SignalOutcome:
        signal = convert.signal(request)
        with self._tracer.start_as_current_span("policy.decide") as span:
            outcome = self._coordinator.signal(
                request.session_id,
                signal,
                received_s,
                token=request.session_token,
                traceparent=traceparent_of(trace.set_span_in_context(span)),
            )
            if span.is_recording():
                span.set_attributes(_attributes(outcome, self._coordinator.policy.name))
        return outcome

    def _message(self, session: Session) -> Any:
        return convert.to_session(
            session,
            self._coordinator.dispatcher.endpoint(session),
            self._coordinator.store.expire_s(session),
        )


def _attributes(outcome: SignalOutcome, policy: str) -> dict[str, str | float]:
    session = outcome.session
    attributes: dict[str, str | float] = {
        "djinn.policy": policy,
        "djinn.worker.id": session.worker_id,
        "djinn.signal.sequence": session.sequence,
    }
    decision = outcome.decision
    if decision is not None:
        attributes["djinn.decision"] = ",".join(name_of(c.action) for c in decision.commands)
        attributes["djinn.decision.reason"] = decision.reason
        if decision.explanation is not None:
            attributes.update(decision.explanation.attributes())
    if outcome.forecast is not None:
        attributes["djinn.expected_wait_seconds"] = outcome.forecast.median_s
        attributes["djinn.expected_wait_source"] = outcome.forecast.source.value
    if outcome.transition.waited is not None:
        attributes["djinn.waited_seconds"] = outcome.transition.waited.duration_s
    return attributes


def _encode_page(session_id: str) -> str:
    return base64.urlsafe_b64encode(session_id.encode()).decode()


def _decode_page(token: str) -> str:
    try:
        after = base64.b64decode(token.encode(), altchars=b"-_", validate=True).decode()
    except (binascii.Error, UnicodeError, ValueError):
        raise InvalidRequestError.of_field("page_token", "is not one of this list's") from None
    return check_session_id(after) if after else ""
