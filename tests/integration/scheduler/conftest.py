"""Schedulers, workers and one session, started for a test and stopped after it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from djinn.v1 import agent_service_pb2 as agent_pb
from tests.support.fake_worker import FakeWorker
from tests.support.scheduler_system import System, Systems


@pytest.fixture
async def systems() -> AsyncIterator[Systems]:
    async with AsyncExitStack() as stack:
        yield Systems(stack)


@pytest.fixture
async def system(systems: Systems) -> System:
    return await systems.start()


@pytest.fixture
async def worker(systems: Systems, system: System) -> FakeWorker:
    return await systems.worker(system)


@pytest.fixture
async def opened(system: System, worker: FakeWorker) -> agent_pb.OpenSessionResponse:
    """Session "a", open on the worker, with a context."""
    response = await system.open("a")
    await worker.expect("open")
    worker.generate("a")
    await system.until(lambda session: session.context_length == 50)
    return response
