"""The scheduler behind `djinn_client.testing`: as strict as the real one where clients notice."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc

from djinn.v1 import (
    admin_service_pb2,
    admin_service_pb2_grpc,
    agent_service_pb2,
    agent_service_pb2_grpc,
    control_service_pb2,
    types_pb2,
)
from djinn_client._fake_faults import Context, FaultError, abort, traceparent_of

if TYPE_CHECKING:
    from djinn_client.testing import FakeServer


@dataclass
class SchedulerSession:
    """A session as the fake scheduler knows it."""

    message: types_pb2.Session
    token: bytes


@dataclass
class SchedulerState:
    """What is lost when the fake scheduler is."""

    epoch: str
    sessions: dict[str, SchedulerSession] = field(default_factory=dict)


class AgentServicer(agent_service_pb2_grpc.AgentServiceServicer):
    """Sessions and phases."""

    def __init__(self, server: FakeServer, state: SchedulerState) -> None:
        self._server = server
        self._state = state

    async def OpenSession(
        self, request: agent_service_pb2.OpenSessionRequest, context: Context
    ) -> agent_service_pb2.OpenSessionResponse:
        try:
            self._server.raise_fault("OpenSession")
            session = self._open(request)
        except FaultError as error:
            await abort(context, error)
            raise
        return agent_service_pb2.OpenSessionResponse(
            session=session.message,
            session_token=session.token,
            scheduler_epoch=self._state.epoch,
        )

    def _open(self, request: agent_service_pb2.OpenSessionRequest) -> SchedulerSession:
        known = self._state.sessions.get(request.session_id)
        if known is not None:
            if known.message.tenant_id != request.tenant_id:
                raise FaultError("SESSION_EXISTS", f"{request.session_id!r} is another tenant's")
            known.message.worker_endpoint = self._server.worker_endpoint
            return known
        session_id = request.session_id or f"fake-{len(self._state.sessions) + 1}"
        fields = {"session_id": session_id, "tenant": request.tenant_id, "name": request.name}
        session = SchedulerSession(
            types_pb2.Session(
                session_id=session_id,
                name=request.name,
                tenant_id=request.tenant_id,
                priority=request.priority,
                phase=types_pb2.AGENT_PHASE_OPEN,
                worker_id="fake-worker",
                worker_endpoint=self._server.worker_endpoint,
            ),
            json.dumps(fields).encode(),
        )
        session.message.open_time.GetCurrentTime()
        self._state.sessions[session_id] = session
        self._server.notify()
        return session

    async def SignalPhase(
        self, request: agent_service_pb2.SignalPhaseRequest, context: Context
    ) -> agent_service_pb2.SignalPhaseResponse:
        try:
            return self._signal(request, traceparent_of(context), streamed=False)
        except FaultError as error:
            await abort(context, error)
            raise

    async def StreamPhases(
        self,
        request_iterator: AsyncIterator[agent_service_pb2.StreamPhasesRequest],
        context: Context,
    ) -> AsyncIterator[agent_service_pb2.StreamPhasesResponse]:
        if not self._server.streams_phases:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "no streams here")
        async for message in request_iterator:
            signal = message.signal
            answer = agent_service_pb2.StreamPhasesResponse(
                session_id=signal.session_id, sequence=signal.sequence
            )
            try:
                answer.response.CopyFrom(self._signal(signal, message.traceparent, streamed=True))
            except FaultError as error:
                answer.error.CopyFrom(error.status())
            if self._server.answers_signals:
                yield answer

    def _signal(
        self, signal: agent_service_pb2.SignalPhaseRequest, traceparent: str, *, streamed: bool
    ) -> agent_service_pb2.SignalPhaseResponse:
        self._server.record_signal(signal, traceparent, streamed=streamed)
        self._server.raise_fault("SignalPhase")
        session = self._state.sessions.get(signal.session_id)
        if session is None and signal.session_token:
            fields = json.loads(signal.session_token)
            session = self._open(
                agent_service_pb2.OpenSessionRequest(
                    session_id=fields["session_id"],
                    tenant_id=fields["tenant"],
                    name=fields["name"],
                )
            )
        if session is None:
            raise FaultError("SESSION_UNKNOWN", f"no session {signal.session_id!r}")
        now = session.message
        ignored = signal.sequence <= now.phase_sequence
        if not ignored:
            now.phase = signal.phase
            now.phase_sequence = signal.sequence
            now.tool_name = signal.tool_name
            now.phase_time.GetCurrentTime()
        return agent_service_pb2.SignalPhaseResponse(
            phase=now.phase,
            sequence=now.phase_sequence,
            ignored=ignored,
            scheduler_epoch=self._state.epoch,
            worker_endpoint=self._server.worker_endpoint,
        )

    async def CloseSession(
        self, request: agent_service_pb2.CloseSessionRequest, context: Context
    ) -> agent_service_pb2.CloseSessionResponse:
        try:
            self._server.raise_fault("CloseSession")
        except FaultError as error:
            await abort(context, error)
        self._state.sessions.pop(request.session_id, None)
        self._server.forget(request.session_id)
        return agent_service_pb2.CloseSessionResponse()

    async def GetSession(
        self, request: agent_service_pb2.GetSessionRequest, context: Context
    ) -> agent_service_pb2.GetSessionResponse:
        session = self._state.sessions.get(request.session_id)
        if session is None:
            await abort(
                context, FaultError("SESSION_UNKNOWN", f"no session {request.session_id!r}")
            )
            raise AssertionError("aborted")
        session.message.worker_endpoint = self._server.worker_endpoint
        return agent_service_pb2.GetSessionResponse(session=session.message)

    async def ListSessions(
        self, request: agent_service_pb2.ListSessionsRequest, context: Context
    ) -> agent_service_pb2.ListSessionsResponse:
        found = sorted(
            (
                session.message
                for session in self._state.sessions.values()
                if not request.HasField("tenant_id")
                or session.message.tenant_id == request.tenant_id
            ),
            key=lambda session: session.session_id,
        )
        found = [session for session in found if session.session_id > request.page_token]
        size = min(request.page_size or 100, self._server.page_size)
        page = found[:size]
        more = page[-1].session_id if len(found) > size else ""
        return agent_service_pb2.ListSessionsResponse(sessions=page, next_page_token=more)


class AdminServicer(admin_service_pb2_grpc.AdminServiceServicer):
    """Commands are recorded and succeed; there is no KV to move."""

    def __init__(self, server: FakeServer, state: SchedulerState) -> None:
        self._server = server
        self._state = state

    def _worker(self) -> admin_service_pb2.Worker:
        return admin_service_pb2.Worker(
            worker_id="fake-worker",
            incarnation_id="fake",
            endpoint=self._server.worker_endpoint,
            model=self._server.model_info,
            draining=self._server.draining,
            sessions=len(self._state.sessions),
        )

    async def ListWorkers(
        self, request: admin_service_pb2.ListWorkersRequest, context: Context
    ) -> admin_service_pb2.ListWorkersResponse:
        return admin_service_pb2.ListWorkersResponse(workers=[self._worker()])

    async def _command(
        self, name: str, session_id: str, context: Context
    ) -> control_service_pb2.CommandResult:
        self._server.record_command(name, session_id)
        if session_id not in self._state.sessions:
            await abort(context, FaultError("SESSION_UNKNOWN", f"no session {session_id!r}"))
        result = control_service_pb2.CommandResult(session_id=session_id)
        try:
            self._server.raise_fault(name)
        except FaultError as error:
            result.status.CopyFrom(error.status())
        return result

    async def EvictSession(
        self, request: admin_service_pb2.EvictSessionRequest, context: Context
    ) -> admin_service_pb2.EvictSessionResponse:
        result = await self._command("EvictSession", request.session_id, context)
        return admin_service_pb2.EvictSessionResponse(result=result)

    async def RestoreSession(
        self, request: admin_service_pb2.RestoreSessionRequest, context: Context
    ) -> admin_service_pb2.RestoreSessionResponse:
        result = await self._command("RestoreSession", request.session_id, context)
        return admin_service_pb2.RestoreSessionResponse(result=result)

    async def DropSession(
        self, request: admin_service_pb2.DropSessionRequest, context: Context
    ) -> admin_service_pb2.DropSessionResponse:
        result = await self._command("DropSession", request.session_id, context)
        return admin_service_pb2.DropSessionResponse(result=result)

    async def ExplainSession(
        self, request: admin_service_pb2.ExplainSessionRequest, context: Context
    ) -> admin_service_pb2.ExplainSessionResponse:
        """Returns the session alone: the fake decides nothing that could be explained."""
        session_id = request.session_id
        if session_id not in self._state.sessions:
            await abort(context, FaultError("SESSION_UNKNOWN", f"no session {session_id!r}"))
        return admin_service_pb2.ExplainSessionResponse(
            session=self._state.sessions[session_id].message, policy="fake"
        )

    async def DrainWorker(
        self, request: admin_service_pb2.DrainWorkerRequest, context: Context
    ) -> admin_service_pb2.DrainWorkerResponse:
        if request.worker_id != "fake-worker":
            await abort(context, FaultError("WORKER_UNKNOWN", f"no worker {request.worker_id!r}"))
        self._server.draining = not request.resume
        return admin_service_pb2.DrainWorkerResponse(worker=self._worker())

    async def GetStats(
        self, request: admin_service_pb2.GetStatsRequest, context: Context
    ) -> admin_service_pb2.GetStatsResponse:
        phases = [session.message.phase for session in self._state.sessions.values()]
        return admin_service_pb2.GetStatsResponse(
            counters=types_pb2.WorkerCounters(generated_tokens=self._server.generated_tokens),
            phases=[
                admin_service_pb2.PhaseCount(phase=phase, sessions=phases.count(phase))
                for phase in sorted(set(phases))
            ],
            policy="fake",
        )
