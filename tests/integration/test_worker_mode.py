"""A worker and schedulers of several policies, one after the other: each serves in its own mode."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

import djinn_client as djinn
from services.common.telemetry import Telemetry
from services.scheduler.app import Scheduler
from services.worker import engine_process
from services.worker.config import EngineConfig, WorkerConfig
from services.worker.front.app import Front
from tests.support.scheduler_system import CONFIG

BLOCK_BYTES = 65_536
"""Of 16 tokens of the tiny model: 4 layers, K and V, 2 heads of 32 float32 each."""
DEVICE_BLOCKS = 16
AGENTS = 6
PROMPT_TOKENS = 60
CYCLES = 3
REQUESTS = AGENTS * CYCLES
NEW_TOKENS = 8

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


@contextlib.asynccontextmanager
async def scheduling(policy: str, port: int) -> AsyncIterator[str]:
    """Runs a scheduler; yields its address."""
    config = replace(CONFIG, policy=policy, port=port, report_interval_s=0.02)
    scheduler = await Scheduler.start(config, Telemetry())
    try:
        yield scheduler.address
    finally:
        await scheduler.stop()


@contextlib.asynccontextmanager
async def working(scheduler: str) -> AsyncIterator[None]:
    """Runs a worker with a device pool that holds half of the agents."""
    engine = EngineConfig(
        model="dummy:tiny",
        block_size_tokens=16,
        device_pool_gib=DEVICE_BLOCKS * BLOCK_BYTES / 2**30,
        host_pool_gib=64 * BLOCK_BYTES / 2**30,
        max_context_length=DEVICE_BLOCKS * 16,
        cpu_threads=1,
        report_interval_s=0.02,
    )
    config = WorkerConfig(engine=engine, port=0, metrics_port=0, scheduler=scheduler)
    stop = asyncio.Event()
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(
        Front(config, engine_process.main, Telemetry()).run(stop, ready.set_result)
    )
    task.add_done_callback(lambda _: ready.done() or ready.cancel())
    await asyncio.wait([ready])
    try:
        yield
    finally:
        stop.set()
        await task


async def run_agents(
    scheduler: str, policy: str, completed: int
) -> tuple[list[list[int]], djinn.Counters]:
    """Lets agents in turn generate and call tools.

    Args:
        scheduler: Its address.
        policy: Its policy.
        completed: Requests that the worker has completed at the end, those of others included.

    Returns:
        What each generated, and what the worker has done since its start.
    """
    made: list[list[int]] = [[] for _ in range(AGENTS)]
    # Another tenant for each policy: nobody finds what those of another one computed.
    async with contextlib.AsyncExitStack() as stack:
        client = await stack.enter_async_context(await djinn.connect(scheduler, tenant=policy))
        agents = [await stack.enter_async_context(client.session()) for _ in made]
        for cycle in range(CYCLES):
            for index, agent in enumerate(agents):
                append = [index, cycle] if cycle else [index] * PROMPT_TOKENS
                result = await agent.generate(
                    append, max_tokens=NEW_TOKENS, ignore_eos=True
                ).result()
                made[index] += result.token_ids
                async with agent.tool("search"):
                    pass
        while True:
            counters = (await client.admin.stats()).counters
            if counters.requests_completed == completed:
                return made, counters


async def test_a_worker_serves_as_the_policy_wants_and_the_tokens_are_the_same() -> None:
    async with contextlib.AsyncExitStack() as stack:
        async with scheduling("reactive-recompute", 0) as address:
            await stack.enter_async_context(working(address))
            recomputed, counters = await run_agents(address, "reactive-recompute", REQUESTS)
            assert (counters.stores, counters.loads, counters.evictions) == (0, 0, 0)
            assert min(counters.drops, counters.recomputed_tokens) > 0
            before = counters
        port = int(address.rpartition(":")[2])
        async with scheduling("reactive-lru", port):
            offloaded, counters = await run_agents(address, "reactive-lru", 2 * REQUESTS)
            assert min(counters.stores, counters.loads, counters.evictions) > 0
            assert counters.drops == before.drops
            assert counters.recomputed_tokens == before.recomputed_tokens
    assert recomputed == offloaded
    assert {len(made) for made in recomputed} == {CYCLES * NEW_TOKENS}
