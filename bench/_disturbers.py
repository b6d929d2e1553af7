"""What goes on beside agents that decode: KV that moves both ways, and new agents that arrive."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import djinn_client as djinn


@dataclass(slots=True)
class Done:
    """What a disturber did while it ran.

    Attributes:
        seconds: How long.
        loaded_bytes: Copied to the device.
        stored_bytes: Copied to the host.
        refused: Evictions that found no room on the host.
        first_token_ms: Of each new agent.
    """

    seconds: float = 0.0
    loaded_bytes: int = 0
    stored_bytes: int = 0
    refused: int = 0
    first_token_ms: list[float] = field(default_factory=list)


@contextlib.asynccontextmanager
async def nothing() -> AsyncIterator[Done]:
    """Does nothing while the context lasts."""
    yield Done()


class Movers:
    """Pairs of sessions that take turns: while one is restored, the other one is evicted.

    Their device blocks are released at once, so that each restore copies all of a session. That
    each evict does too takes a host pool with little more room than the evicted ones need: the copy
    of a session that came back has then been given up before it goes again.

    Args:
        client: Whose sessions.
        pairs: How many move at once.
        context: Tokens of each.
        vocab_size: Token ids are below it.
    """

    def __init__(self, client: djinn.Client, pairs: int, context: int, vocab_size: int) -> None:
        self._client = client
        self._context = context
        self._pairs = [(client.session(), client.session()) for _ in range(pairs)]
        self._random = random.Random(-1)
        self._vocab_size = vocab_size

    async def open(self) -> None:
        """Gives every session its KV and evicts one of each pair."""
        for pair in self._pairs:
            for session in pair:
                await session.open()
                prompt = self._random.choices(range(self._vocab_size), k=self._context)
                await session.generate(prompt, max_tokens=1, ignore_eos=True).result()
            await self._client.admin.evict(pair[1].session_id, djinn.EvictMode.RELEASE)

    @contextlib.asynccontextmanager
    async def moving(self) -> AsyncIterator[Done]:
        """Moves all pairs, one after another without a pause, while the context lasts."""
        done, stop = Done(), asyncio.Event()
        start = time.perf_counter()
        running = [
            asyncio.create_task(self._move(index, done, stop)) for index in range(len(self._pairs))
        ]
        try:
            yield done
        finally:
            done.seconds = time.perf_counter() - start
            stop.set()
            await asyncio.gather(*running)

    async def _move(self, index: int, done: Done, stop: asyncio.Event) -> None:
        admin = self._client.admin
        while not stop.is_set():
            here, away = self._pairs[index]
            back = await admin.restore(away.session_id)
            if not stop.is_set():
                done.loaded_bytes += back.moved_bytes
            try:
                gone = await admin.evict(here.session_id, djinn.EvictMode.RELEASE)
            except djinn.ExhaustedError:
                done.refused += 1
                continue
            if not stop.is_set():
                done.stored_bytes += gone.moved_bytes
            self._pairs[index] = (away, here)


@contextlib.asynccontextmanager
async def arrivals(
    client: djinn.Client, per_s: float, context: int, vocab_size: int
) -> AsyncIterator[Done]:
    """Has new agents arrive, evenly spaced, each with a prompt, while the context lasts.

    Args:
        client: Whose sessions.
        per_s: How many a second.
        context: Tokens of each prompt.
        vocab_size: Token ids are below it.
    """
    done, tokens = Done(), random.Random(-2)
    start = time.perf_counter()

    async def live() -> None:
        prompt = tokens.choices(range(vocab_size), k=context)
        async with client.session() as agent:
            result = await agent.generate(prompt, max_tokens=1, ignore_eos=True).result()
        done.first_token_ms.append(result.first_token_s * 1e3)

    async def arrive() -> None:
        async with asyncio.TaskGroup() as group:
            count = 0
            while True:
                group.create_task(live())
                count += 1
                await asyncio.sleep(max(0.0, start + count / per_s - time.perf_counter()))

    arriving = asyncio.create_task(arrive())
    try:
        yield done
    finally:
        done.seconds = time.perf_counter() - start
        arriving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await arriving
