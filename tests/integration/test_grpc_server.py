"""The gRPC server with real calls over a real port."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from opentelemetry import trace

from djinn.v1 import agent_service_pb2 as agent
from djinn.v1 import agent_service_pb2_grpc as agent_grpc
from djinn.v1 import inference_service_pb2 as inference
from djinn.v1 import inference_service_pb2_grpc as inference_grpc
from services.common.errors import (
    ConfigError,
    ExhaustedError,
    InvalidRequestError,
    SessionBusyError,
    UnknownSessionError,
)
from services.common.grpc_server import CHANNEL_OPTIONS, MAX_MESSAGE_BYTES, GrpcServer, serve
from services.common.status import error_from_rpc

AGENT = "djinn.v1.AgentService"
INFERENCE = "djinn.v1.InferenceService"
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Agents(agent_grpc.AgentServiceServicer):
    """Fails in the way that the session's id says."""

    def __init__(self) -> None:
        self.trace_id = 0
        self.entered = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.release = asyncio.Event()

    async def GetSession(self, request: Any, context: Any) -> Any:
        match request.session_id:
            case "unknown":
                raise UnknownSessionError.of("unknown")
            case "full":
                raise ExhaustedError("no room for more", retry_after_s=2.5)
            case "bug":
                raise ZeroDivisionError("a secret of the server's")
            case "wait":
                self.entered.set()
                try:
                    await self.release.wait()
                except asyncio.CancelledError:
                    self.cancelled.set()
                    raise
        self.trace_id = trace.get_current_span().get_span_context().trace_id
        response = agent.GetSessionResponse()
        response.session.session_id = request.session_id
        return response

    async def StreamPhases(
        self, request_iterator: AsyncIterator[Any], context: Any
    ) -> AsyncIterator[Any]:
        async for request in request_iterator:
            if request.signal.session_id == "unknown":
                raise UnknownSessionError.of("unknown")
            yield agent.StreamPhasesResponse(session_id=request.signal.session_id)


class Generates(inference_grpc.InferenceServiceServicer):
    """A generator that says what becomes of it."""

    def __init__(self) -> None:
        self.trace_id = 0
        self.events: list[str] = []
        self.closed = asyncio.Event()

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.trace_id = trace.get_current_span().get_span_context().trace_id
        task = asyncio.current_task()
        try:
            yield inference.GenerateResponse()
            if request.session_id == "busy":
                raise SessionBusyError("session 'busy' runs a Generate already")
            if request.session_id == "bug":
                raise ZeroDivisionError("a secret of the server's")
            if request.session_id == "endless":
                while True:
                    yield inference.GenerateResponse()
                    await asyncio.sleep(0)
        finally:
            self.events.append("same task" if asyncio.current_task() is task else "another task")
            self.closed.set()


class Fixture:
    def __init__(self, server: GrpcServer, channel: grpc.aio.Channel) -> None:
        self.server = server
        self.channel = channel
        self.agents: Any = agent_grpc.AgentServiceStub(channel)
        self.inference: Any = inference_grpc.InferenceServiceStub(channel)
        self.health: Any = health_pb2_grpc.HealthStub(channel)


@pytest.fixture
def agents() -> Agents:
    # Without the methods that no test calls but one, which expects to find it missing.
    return Agents()  # type: ignore[abstract]


@pytest.fixture
def generates() -> Generates:
    return Generates()  # type: ignore[abstract]


@pytest.fixture
async def rig(agents: Agents, generates: Generates) -> AsyncIterator[Fixture]:
    server = await serve(
        [
            (agent_grpc.add_AgentServiceServicer_to_server, agents),
            (inference_grpc.add_InferenceServiceServicer_to_server, generates),
        ],
        [AGENT, INFERENCE],
        "127.0.0.1",
        0,
    )
    async with grpc.aio.insecure_channel(server.address, options=CHANNEL_OPTIONS) as channel:
        yield Fixture(server, channel)
    await server.stop(0)


def get(session_id: str) -> agent.GetSessionRequest:
    return agent.GetSessionRequest(session_id=session_id)


async def signals(*session_ids: str) -> AsyncIterator[agent.StreamPhasesRequest]:
    for session_id in session_ids:
        request = agent.StreamPhasesRequest()
        request.signal.session_id = session_id
        yield request


async def test_a_call_is_answered_on_the_port_that_was_bound(rig: Fixture) -> None:
    assert rig.server.port > 0

    response = await rig.agents.GetSession(get("s-1"))

    assert response.session.session_id == "s-1"


async def test_an_error_of_the_tree_ends_a_unary_call_with_its_details(rig: Fixture) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rig.agents.GetSession(get("unknown"))

    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert caught.value.details() == "no session 'unknown'"
    assert isinstance(error_from_rpc(caught.value), UnknownSessionError)


async def test_the_time_to_retry_reaches_the_client(rig: Fixture) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rig.agents.GetSession(get("full"))

    error = error_from_rpc(caught.value)
    assert isinstance(error, ExhaustedError)
    assert error.retry_after_s == 2.5


async def test_an_error_in_the_middle_of_a_server_stream(rig: Fixture) -> None:
    call = rig.inference.Generate(inference.GenerateRequest(session_id="busy"))

    await call.read()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()

    assert isinstance(error_from_rpc(caught.value), SessionBusyError)


async def test_an_error_in_the_middle_of_a_bidirectional_stream(rig: Fixture) -> None:
    call = rig.agents.StreamPhases(signals("a", "b", "unknown", "c"))

    assert [(await call.read()).session_id for _ in range(2)] == ["a", "b"]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()

    assert isinstance(error_from_rpc(caught.value), UnknownSessionError)


@pytest.mark.parametrize("kind", ["unary", "stream"])
async def test_a_bug_is_logged_with_its_stack_and_not_told_to_the_client(
    rig: Fixture, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    async def fail() -> None:
        if kind == "unary":
            await rig.agents.GetSession(get("bug"))
        else:
            async for _ in rig.inference.Generate(inference.GenerateRequest(session_id="bug")):
                pass

    with caplog.at_level(logging.ERROR), pytest.raises(grpc.aio.AioRpcError) as caught:
        await fail()

    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert caught.value.details() == "internal error; see the server's log"
    stacks = [record for record in caplog.records if record.exc_info]
    assert len(stacks) == 1
    assert "ZeroDivisionError: a secret" in caplog.text


async def test_a_bug_disturbs_no_other_call(rig: Fixture) -> None:
    with pytest.raises(grpc.aio.AioRpcError):
        await rig.agents.GetSession(get("bug"))

    assert (await rig.agents.GetSession(get("s-1"))).session.session_id == "s-1"


async def test_a_method_that_is_missing_is_unimplemented(
    rig: Fixture, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rig.agents.CloseSession(agent.CloseSessionRequest())

    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert not caplog.records


async def test_cancelling_a_call_cancels_its_handler(rig: Fixture, agents: Agents) -> None:
    call = rig.agents.GetSession(get("wait"))
    waiting = asyncio.ensure_future(call)
    await agents.entered.wait()

    call.cancel()

    with pytest.raises(asyncio.CancelledError):
        await waiting
    await agents.cancelled.wait()


async def test_cancelling_a_stream_closes_its_generator_in_its_own_task(
    rig: Fixture, generates: Generates, caplog: pytest.LogCaptureFixture
) -> None:
    call = rig.inference.Generate(inference.GenerateRequest(session_id="endless"))
    await call.read()

    call.cancel()
    await generates.closed.wait()

    assert generates.events == ["same task"]
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_a_deadline_is_kept_and_cancels_the_handler(rig: Fixture, agents: Agents) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rig.agents.GetSession(get("wait"), timeout=0.05)

    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await agents.cancelled.wait()


async def test_handlers_run_in_the_trace_of_the_call(
    rig: Fixture, agents: Agents, generates: Generates
) -> None:
    metadata = (("traceparent", TRACEPARENT),)

    await rig.agents.GetSession(get("s-1"), metadata=metadata)
    async for _ in rig.inference.Generate(inference.GenerateRequest(), metadata=metadata):
        pass

    assert agents.trace_id == generates.trace_id == 0x0AF7651916CD43DD8448EB211C80319C


@pytest.mark.parametrize("metadata", [(), (("traceparent", "00-nonsense"),)])
async def test_a_call_without_a_trace_has_none(
    rig: Fixture, agents: Agents, metadata: tuple[tuple[str, str], ...]
) -> None:
    await rig.agents.GetSession(get("s-1"), metadata=(("traceparent", TRACEPARENT),))

    await rig.agents.GetSession(get("s-1"), metadata=metadata)

    assert agents.trace_id == 0


async def test_a_busy_port_is_named(rig: Fixture) -> None:
    with pytest.raises(ConfigError, match=rf"^--port {rig.server.port}: address already in use$"):
        await serve([], [], "127.0.0.1", rig.server.port)


async def test_a_port_is_free_again_after_stop() -> None:
    first = await serve([], [], "127.0.0.1", 0)
    await first.stop(0)

    second = await serve([], [], "127.0.0.1", first.port)

    assert second.port == first.port
    await second.stop(0)


async def test_a_host_of_another_machine_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^--host 192\.0\.2\.1: not an address of this machine"):
        await serve([], [], "192.0.2.1", 0)


async def test_messages_larger_than_grpcs_default_pass(rig: Fixture) -> None:
    request = agent.GetSessionRequest(session_id="x" * (8 * 2**20))

    assert len((await rig.agents.GetSession(request)).session.session_id) == 8 * 2**20
    assert MAX_MESSAGE_BYTES == 64 * 2**20


@pytest.mark.parametrize("service", ["", AGENT, INFERENCE])
async def test_health_says_whether_it_serves(rig: Fixture, service: str) -> None:
    request = health_pb2.HealthCheckRequest(service=service)

    assert (await rig.health.Check(request)).status == health_pb2.HealthCheckResponse.SERVING
    rig.server.set_serving(False)
    assert (await rig.health.Check(request)).status == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_health_knows_no_other_service(rig: Fixture) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rig.health.Check(health_pb2.HealthCheckRequest(service="no.such.Service"))

    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_health_lists_every_service(rig: Fixture) -> None:
    request: Any = health_pb2
    response = await rig.health.List(request.HealthListRequest())

    assert set(response.statuses) == {"", AGENT, INFERENCE}


async def test_a_watcher_is_told_of_the_drain_and_does_not_hold_it_up(rig: Fixture) -> None:
    call = rig.health.Watch(health_pb2.HealthCheckRequest())
    assert (await call.read()).status == health_pb2.HealthCheckResponse.SERVING

    # A drain that waited for the watcher would run into the test's time limit.
    stopping = asyncio.create_task(rig.server.stop(3600))

    assert (await call.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert await call.read() is grpc.aio.EOF
    await stopping


async def test_watching_an_unknown_service_says_so(rig: Fixture) -> None:
    call = rig.health.Watch(health_pb2.HealthCheckRequest(service="no.such.Service"))

    assert (await call.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    call.cancel()


async def test_a_drain_lets_running_calls_finish(rig: Fixture, agents: Agents) -> None:
    call = asyncio.ensure_future(rig.agents.GetSession(get("wait")))
    await agents.entered.wait()

    stopping = asyncio.create_task(rig.server.stop(3600))
    agents.release.set()

    assert (await call).session.session_id == "wait"
    await stopping


async def test_a_drain_cancels_what_does_not_finish(rig: Fixture, agents: Agents) -> None:
    call = asyncio.ensure_future(rig.agents.GetSession(get("wait")))
    await agents.entered.wait()

    await rig.server.stop(0.05)

    await agents.cancelled.wait()
    with pytest.raises(grpc.aio.AioRpcError):
        await call


async def test_reflection_names_every_service(rig: Fixture) -> None:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(
        rig.channel  # type: ignore[arg-type]
    )

    async def ask() -> AsyncIterator[Any]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")
        yield reflection_pb2.ServerReflectionRequest(file_containing_symbol=AGENT)

    listed, described = [response async for response in stub.ServerReflectionInfo(ask())]

    names = {service.name for service in listed.list_services_response.service}
    assert names == {
        AGENT,
        INFERENCE,
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    assert described.file_descriptor_response.file_descriptor_proto


async def test_the_field_that_is_wrong_reaches_the_client(rig: Fixture, agents: Agents) -> None:
    async def refuse(request: Any, context: Any) -> Any:
        raise InvalidRequestError.of_field("session_id", "empty")

    server = await serve(
        [
            (
                lambda servicer, server: server.add_generic_rpc_handlers(
                    (
                        grpc.method_handlers_generic_handler(
                            "test.Service",
                            {"Refuse": grpc.unary_unary_rpc_method_handler(refuse)},
                        ),
                    )
                ),
                object(),
            )
        ],
        [],
        "127.0.0.1",
        0,
    )
    async with grpc.aio.insecure_channel(server.address) as channel:
        call: Any = channel.unary_unary("/test.Service/Refuse")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"")
    await server.stop(0)

    error = error_from_rpc(caught.value)
    assert isinstance(error, InvalidRequestError)
    assert error.metadata == {"field": "session_id"}
