"""A whole scheduler in the test's process, and clients of it over real gRPC."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import grpc
import pytest

from djinn.v1 import admin_service_pb2_grpc as admin_grpc
from djinn.v1 import agent_service_pb2 as agent_pb
from djinn.v1 import agent_service_pb2_grpc as agent_grpc
from djinn.v1 import types_pb2 as types
from services.common.errors import (
    DjinnError,
)
from services.common.status import error_from_rpc
from services.common.telemetry import Telemetry
from services.scheduler.app import Scheduler
from services.scheduler.config import SchedulerConfig
from tests.support.fake_worker import FakeWorker

CONFIG = SchedulerConfig(port=0, metrics_port=0, drain_timeout_s=1.0)
COMPUTE = types.AGENT_PHASE_COMPUTE
IO_WAIT = types.AGENT_PHASE_IO_WAIT


@dataclass
class System:
    """A scheduler with a client's stubs to it."""

    scheduler: Scheduler
    agents: agent_grpc.AgentServiceAsyncStub
    admin: admin_grpc.AdminServiceAsyncStub
    channel: grpc.aio.Channel

    @property
    def address(self) -> str:
        return self.scheduler.address

    async def open(self, session_id: str = "a", **fields: Any) -> agent_pb.OpenSessionResponse:
        return await self.agents.OpenSession(
            agent_pb.OpenSessionRequest(session_id=session_id, **fields)
        )

    async def signal(
        self, phase: types.AgentPhase.ValueType, sequence: int, session_id: str = "a", **fields: Any
    ) -> agent_pb.SignalPhaseResponse:
        return await self.agents.SignalPhase(
            agent_pb.SignalPhaseRequest(
                session_id=session_id, phase=phase, sequence=sequence, **fields
            )
        )

    async def get(self, session_id: str = "a") -> types.Session:
        request = agent_pb.GetSessionRequest(session_id=session_id)
        return (await self.agents.GetSession(request)).session

    async def close(self, session_id: str = "a") -> None:
        await self.agents.CloseSession(agent_pb.CloseSessionRequest(session_id=session_id))

    async def until(self, holds: Callable[[types.Session], bool], session_id: str = "a") -> None:
        """Asks after a session until what the worker said of it has arrived."""
        while not holds(await self.get(session_id)):
            continue


class Systems:
    """Starts schedulers and workers, and stops them at the end of the test."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack

    async def start(self, config: SchedulerConfig = CONFIG, telemetry: Any = None) -> System:
        scheduler = await Scheduler.start(config, telemetry or Telemetry())
        self._stack.push_async_callback(scheduler.stop)
        channel = await self._stack.enter_async_context(
            grpc.aio.insecure_channel(scheduler.address)
        )
        return System(
            scheduler,
            agent_grpc.AgentServiceStub(channel),
            admin_grpc.AdminServiceStub(channel),
            channel,
        )

    async def worker(
        self, system: System, worker_id: str = "worker-0", **fields: Any
    ) -> FakeWorker:
        worker = FakeWorker(worker_id, **fields)
        self._stack.push_async_callback(worker.disconnect)
        return await worker.connect(system.address)


async def refused(call: Any, error: type[DjinnError]) -> DjinnError:
    """Awaits a call that must fail with an error of the tree, and returns that."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    found = error_from_rpc(caught.value)
    assert type(found) is error, caught.value.details()
    return found
