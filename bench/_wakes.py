"""Agents that go to sleep and wake, and what becomes of their KV meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
from dataclasses import dataclass

import djinn_client as djinn

# Whose wake is furthest away gives its blocks up first: the agent that is measured.
_FAR_S = 7200.0
_LESS_FAR_S = 3600.0


@dataclass(frozen=True, slots=True)
class Wake:
    """One wake, as its client saw it.

    Attributes:
        latency_ms: COMPUTE sent to first token received.
        kv_bytes: Copied back.
        found_blocks: Found on the device.
        recomputed_tokens: Computed again, since nothing held their KV.
    """

    latency_ms: float
    kv_bytes: int
    found_blocks: int
    recomputed_tokens: int


@dataclass(frozen=True, slots=True)
class Life:
    """How an agent lives, in tokens.

    Attributes:
        context: When it falls asleep for the first time.
        append: Of a tool's result.
        generate: Of each answer.
    """

    context: int
    append: int
    generate: int


class Agents:
    """Agents of one client.

    Args:
        client: The client.
        worker: Its server's worker.
        life: How they live.
        seed: Of their tokens and of their tools' durations.
    """

    def __init__(
        self, client: djinn.Client, worker: djinn.WorkerInfo, life: Life, seed: int = 0
    ) -> None:
        self._client = client
        self._worker = worker
        self._life = life
        self._random = random.Random(seed)

    async def wake_alone(self, *, overwrite: bool, tool_s: float) -> Wake:
        """Returns the wake of a new agent that is alone while it wakes.

        Args:
            overwrite: Others use all of the device's memory while it sleeps.
            tool_s: It sleeps this long, after that.
        """
        async with self._client.session() as agent:
            await self._live_awhile(agent)
            await self._say_io_wait(agent, _FAR_S)
            if overwrite:
                await self._overwrite_device()
            await asyncio.sleep(tool_s)
            agent.signal_phase("COMPUTE")
            return await self._go_on(agent)

    async def wake_among(self, agents: int, wakes: int, tool_s: tuple[float, float]) -> list[Wake]:
        """Returns the wakes of agents that all live to the end, in the order in which they end.

        Args:
            agents: How many.
            wakes: Of each of them.
            tool_s: Their tools take a time between these two, evenly distributed.
        """
        found: list[Wake] = []
        everybody = asyncio.Barrier(agents)

        async def live() -> None:
            async with self._client.session() as agent:
                await self._live_awhile(agent)
                await everybody.wait()
                for _ in range(wakes):
                    async with agent.tool("bench"):
                        await asyncio.sleep(self._random.uniform(*tool_s))
                    found.append(await self._go_on(agent))
                await everybody.wait()

        await asyncio.gather(*(live() for _ in range(agents)))
        return found

    async def _live_awhile(self, agent: djinn.Session) -> None:
        prompt = self._tokens(max(1, self._life.context - self._life.generate))
        await self._generate(agent, prompt, self._life.generate)

    @staticmethod
    async def _say_io_wait(agent: djinn.Session, expected_s: float) -> None:
        # A tool of its own: what is learnt of one says nothing of another.
        tool = f"bench-{agent.session_id}"
        await agent.signal_phase("IO_WAIT", tool_name=tool, expected_s=expected_s)

    async def _go_on(self, agent: djinn.Session) -> Wake:
        prompt = self._tokens(self._life.append)
        result = await self._generate(agent, prompt, self._life.generate)
        assert result.wake_latency_s is not None
        return Wake(
            latency_ms=result.wake_latency_s * 1e3,
            kv_bytes=result.kv.loaded_bytes,
            found_blocks=result.kv.resident_blocks + result.kv.held_blocks,
            recomputed_tokens=result.kv.recomputed_tokens,
        )

    async def _overwrite_device(self) -> None:
        """Has new agents use all of the device pool; they live until the last of them is done."""
        size = self._worker.model.block_size_tokens
        blocks = math.ceil(self._life.context / size)
        async with contextlib.AsyncExitStack() as alive:
            for _ in range(math.ceil(self._worker.device_blocks / blocks)):
                other = await alive.enter_async_context(self._client.session())
                await self._generate(other, self._tokens(self._life.context), 1)
                await self._say_io_wait(other, _LESS_FAR_S)

    async def _generate(
        self, agent: djinn.Session, prompt: list[int], tokens: int
    ) -> djinn.GenerateResult:
        return await agent.generate(prompt, max_tokens=tokens, ignore_eos=True).result()

    def _tokens(self, count: int) -> list[int]:
        return self._random.choices(range(self._worker.model.vocab_size), k=count)
