"""Agents at work while workers and schedulers come and go: nothing that they see may change."""

from __future__ import annotations

import asyncio
import random

import pytest

import djinn_client as djinn
from djinn_client import Phase
from djinn_client.testing import FakeServer

EOS = 256
QUICK = djinn.RetryPolicy(give_up_s=30, initial_s=0.005, max_s=0.02)


class Trouble:
    """Breaks one thing after another, and mends it, until it is told to stop."""

    def __init__(self, fake: FakeServer, seed: int) -> None:
        self._fake = fake
        self._random = random.Random(seed)
        self._over = asyncio.Event()
        self.count = 0

    async def make(self) -> None:
        while not self._over.is_set():
            trouble = [self._lose_worker, self._lose_scheduler, self._inject, self._forget]
            await self._random.choice(trouble)()
            self.count += 1
            await self._let_agents_come_forward()

    async def _let_agents_come_forward(self) -> None:
        seen = len(self._fake.requests)
        await self._fake.wait_until(lambda: len(self._fake.requests) > seen or self._over.is_set())

    def stop(self) -> None:
        self._over.set()
        self._fake.notify()

    async def _lose_worker(self) -> None:
        await self._fake.lose_worker()
        await self._fake.start_worker(port=self._random.choice([0, None]))

    async def _lose_scheduler(self) -> None:
        await self._fake.stop_scheduler()
        await self._fake.start_scheduler()

    async def _inject(self) -> None:
        reason = self._random.choice(["ENGINE_LOST", "DRAINING"])
        self._fake.fail("Generate", reason, after_tokens=self._random.choice([None, 0, 3]))

    async def _forget(self) -> None:
        for request in self._fake.requests[-3:]:
            self._fake.forget(request.session_id)


async def _live(client: djinn.Client, fake: FakeServer, seed: int, rounds: int) -> None:
    choose = random.Random(seed)
    async with client.session(name=f"agent-{seed}") as agent:
        known: tuple[int, ...] = ()
        for number in range(rounds):
            prompt = f"{seed}/{number} é😀 "
            if choose.random() < 0.3:
                async for _ in agent.generate(prompt):
                    if choose.random() < 0.3:
                        break
                known = agent.context
                continue
            most = choose.choice([None, 1, 5, 200])
            stop = choose.choice([(), ("token",)])
            read = len(known) + len(prompt.encode())
            answer = f"[{read} tokens read]".encode()
            generation = agent.generate(prompt, max_tokens=most, stop=stop)
            text = "".join([piece.text async for piece in generation])
            result = await generation.result()
            expected = (*answer, EOS)[:most]
            if stop and b"token" in bytes(answer[:most]):
                expected = tuple(answer[: answer.index(b"token") + 5])
                assert result.stop_string == "token"
            assert result.token_ids == expected
            assert text == result.text
            known = (*known, *prompt.encode(), *expected)
            assert agent.context == known
            async with agent.tool(f"tool-{number}"):
                await asyncio.sleep(0)
        await agent.signal_phase("IO_WAIT", tool_name="last")
        await fake.wait_until(
            lambda: any(
                signal.session_id == agent.session_id and signal.tool_name == "last"
                for signal in fake.signals
            )
        )
        assert agent.phase is Phase.IO_WAIT


@pytest.mark.parametrize("seed", range(4))
async def test_agents_notice_nothing_but_time(seed: int) -> None:
    async with FakeServer(max_context_length=100_000) as fake:
        trouble = Trouble(fake, seed)
        async with await djinn.connect(fake.endpoint, retry=QUICK) as client:
            making = asyncio.create_task(trouble.make())
            try:
                async with asyncio.TaskGroup() as agents:
                    for number in range(3):
                        agents.create_task(_live(client, fake, 100 * seed + number, rounds=8))
            finally:
                trouble.stop()
                await making
        assert trouble.count > 3
