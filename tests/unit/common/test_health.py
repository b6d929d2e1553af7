"""What the health service says of services, and of parts that are ready later."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from grpc_health.v1 import health_pb2

from services.common.health import HealthService

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def said(health: HealthService) -> dict[str, int]:
    request: Any = None
    response = await health.List(request, request)
    return {name: answer.status for name, answer in response.statuses.items()}


async def test_a_part_serves_once_it_and_the_process_do() -> None:
    health = HealthService(["a.Service"], ["a.Part"])
    assert set((await said(health)).values()) == {NOT_SERVING}
    health.set_serving(True)
    assert await said(health) == {"": SERVING, "a.Service": SERVING, "a.Part": NOT_SERVING}
    health.set_ready("a.Part")
    assert await said(health) == {"": SERVING, "a.Service": SERVING, "a.Part": SERVING}


@pytest.mark.parametrize("end", ["stop", "drain"])
async def test_a_ready_part_ends_with_the_process(end: str) -> None:
    health = HealthService(["a.Service"], ["a.Part"])
    health.set_ready("a.Part")
    health.set_serving(True)
    if end == "drain":
        health.drain()
    else:
        health.set_serving(False)
    assert set((await said(health)).values()) == {NOT_SERVING}


class Watcher:
    """The context of a Watch; notes what is written."""

    def __init__(self) -> None:
        self.heard: list[int] = []

    async def write(self, response: health_pb2.HealthCheckResponse) -> None:
        self.heard.append(response.status)


async def test_a_watcher_hears_of_a_part_when_it_is_ready() -> None:
    health = HealthService(["a.Service"], ["a.Part"])
    health.set_serving(True)
    watcher = Watcher()
    request = health_pb2.HealthCheckRequest(service="a.Part")
    watch = asyncio.create_task(health.Watch(request, watcher))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    health.set_ready("a.Part")
    await asyncio.sleep(0)
    health.drain()
    await watch
    assert watcher.heard == [NOT_SERVING, SERVING, NOT_SERVING]
