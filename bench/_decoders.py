"""Agents that decode in processes of their own, so that nothing else disturbs their clocks.

Parent and child speak over a pipe: the child says that its agents are ready, then answers each
`Run` with what it measured, until the pipe is closed.
"""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import djinn_client as djinn
from loadgen.pacer import LagProbe

# The first tokens of a generation come while others of the same round are still being started.
_SETTLE_TOKENS = 8


class DecoderError(Exception):
    """A process that was to decode has ended."""


@dataclass(frozen=True, slots=True)
class Job:
    """What one process decodes.

    Attributes:
        server: host:port of the scheduler.
        agents: How many decode at once.
        context: Tokens of each before the first generated one.
        vocab_size: Token ids are below it.
        seed: Of the contexts.
    """

    server: str
    agents: int
    context: int
    vocab_size: int
    seed: int


@dataclass(frozen=True, slots=True)
class Run:
    """One round: every agent generates this many tokens after its first context."""

    tokens: int


@dataclass(frozen=True, slots=True)
class Measured:
    """What a process saw in one round.

    Attributes:
        gaps_ms: Between one token and the next, of all agents.
        loop_lag_p99_ms: How late its event loop ran.
    """

    gaps_ms: list[float]
    loop_lag_p99_ms: float


class Decoders:
    """The parent's side: starts the processes and lets them all run rounds at once.

    Args:
        jobs: One for each process.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for job in jobs:
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=_main, args=(job, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    async def wait_ready(self) -> None:
        """Waits until all agents have their contexts.

        Raises:
            DecoderError: A process has ended.
        """
        await self._receive()

    async def run(self, tokens: int) -> list[Measured]:
        """Runs a round and returns what each process measured.

        Raises:
            DecoderError: A process has ended.
        """
        for pipe in self._pipes:
            pipe.send(Run(tokens))
        return await self._receive()

    def close(self) -> None:
        """Ends the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join()

    async def _receive(self) -> list[Any]:
        try:
            return await asyncio.gather(*(asyncio.to_thread(pipe.recv) for pipe in self._pipes))
        except EOFError:
            raise DecoderError("a client process has ended, see above why") from None


def _main(job: Job, pipe: Connection) -> None:
    # Ctrl-C is for the parent, whose end closes the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asyncio.run(_serve(job, pipe))


async def _serve(job: Job, pipe: Connection) -> None:
    tokens = random.Random(job.seed)
    async with await djinn.connect(job.server) as client:
        agents = [client.session() for _ in range(job.agents)]
        for agent in agents:
            await agent.open()
            prompt = tokens.choices(range(job.vocab_size), k=job.context)
            await agent.generate(prompt, max_tokens=1, ignore_eos=True).result()
        contexts = [agent.context[: job.context] for agent in agents]
        pipe.send(None)
        while True:
            try:
                run: Run = await asyncio.to_thread(pipe.recv)
            except EOFError:
                return
            probe = LagProbe(process=0)
            probe.start()
            gaps = await asyncio.gather(
                *(
                    _gaps_ms(agent, context, run.tokens)
                    for agent, context in zip(agents, contexts, strict=True)
                )
            )
            pipe.send(Measured(list(itertools.chain(*gaps)), probe.stop().p99_ms))


async def _gaps_ms(agent: djinn.Session, context: Sequence[int], tokens: int) -> list[float]:
    """Returns the times between the tokens of one generation that begins with `context`."""
    times: list[float] = []
    generation = agent.generate(None, full_context=context, max_tokens=tokens, ignore_eos=True)
    async for piece in generation:
        times.extend(itertools.repeat(time.perf_counter(), len(piece.token_ids)))
    settled = times[_SETTLE_TOKENS:]
    return [(after - before) * 1e3 for before, after in itertools.pairwise(settled)]
