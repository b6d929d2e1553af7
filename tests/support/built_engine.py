"""The engine as its process builds it, driven in process: what agents do, without a front."""

from __future__ import annotations

import random
import select
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import torch

from services.worker.config import EngineConfig
from services.worker.engine.model_loader import LoadedModel, load
from services.worker.engine.models.any import ATTENTION_NAME
from services.worker.engine.process import build
from services.worker.engine.streams import Wakeup
from services.worker.messages import (
    Abort,
    Action,
    Close,
    Command,
    CommandDone,
    Evict,
    EvictMode,
    Finished,
    Rejected,
    SamplingParams,
    Submit,
    ToFront,
    Tokens,
)


class BuiltEngine:
    """An engine, its model and its streams.

    Attributes:
        engine: The engine.
        ready: What it says of itself when it is built.
        host: The host pool.
        device_pool: The device pool, uint8, ``[num_blocks, block_bytes]``.

    Args:
        config: What to build.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._wakeup = Wakeup()
        self._built = build(config, self._wakeup, _tell_nobody)
        self.engine = self._built.engine
        self.ready = self._built.ready
        self.host = self._built.host
        # Nobody but a test looks into the pool from outside.
        self.device_pool = self.engine._mover._device.view(-1, self.ready.block_bytes)
        self._names: Counter[str] = Counter()

    def close(self) -> None:
        """Ends the streams and frees what was pinned."""
        for stream in self._built.streams:
            stream.close()
        self.host.close()
        self._wakeup.close()

    def submit(
        self,
        session_id: str,
        append: Sequence[int],
        max_tokens: int,
        *,
        full_context: Sequence[int] | None = None,
        cache_salt: str = "",
        return_logits: bool = False,
    ) -> str:
        """Sends a `Submit`; returns its request id, which begins with the session's and a slash."""
        request_id = self._name(session_id)
        self.engine.handle(
            Submit(
                request_id=request_id,
                session_id=session_id,
                create=True,
                cache_salt=cache_salt,
                priority=0,
                scheduler_record=b"",
                full_context=None if full_context is None else list(full_context),
                expected_context_length=None,
                append=list(append),
                sampling=SamplingParams(),
                max_tokens=max_tokens,
                stop_token_ids=[],
                logprobs=None,
                return_logits=return_logits,
                received_ns=0,
            )
        )
        return request_id

    def command(self, session_id: str, action: Action) -> str:
        """Sends a `Command`; returns its id."""
        command_id = self._name(session_id)
        self.engine.handle(Command(command_id, session_id, action))
        return command_id

    def _name(self, session_id: str) -> str:
        self._names[session_id] += 1
        return f"{session_id}/{self._names[session_id]}"

    def turn(self) -> list[ToFront]:
        """Lets the engine go on; returns what it said, tokens before anything else happens."""
        self._wakeup.clear()
        self.engine.collect()
        if not self.engine.outbox:
            self.engine.grow_host(self.host.usable_blocks)
            self.engine.turn()
        heard, self.engine.outbox = self.engine.outbox, []
        # A GPU's events wake nobody, so while any is awaited the caller spins.
        if not heard and self._built.wakes_loop and not self.engine.idle:
            due_s = self.engine.due_s
            timeout_s = 1.0 if due_s is None else max(0.0, due_s - time.monotonic())
            select.select([self._wakeup.fileno()], [], [], timeout_s)
        return heard

    def settle(self) -> None:
        """Blocks until every step and copy that has been launched is done."""
        for stream in self._built.streams:
            stream.record().synchronize()

    def run(self, hear: Callable[[ToFront], None], until: Callable[[], bool]) -> None:
        """Lets the engine turn until `until`; `hear` gets all that it says."""
        while not until():
            for message in self.turn():
                hear(message)

    def generate(self, request_ids: Iterable[str]) -> dict[str, list[Tokens]]:
        """Runs requests to their ends and returns what each was sent."""
        made: dict[str, list[Tokens]] = {request_id: [] for request_id in request_ids}
        running = set(made)

        def hear(message: ToFront) -> None:
            assert not isinstance(message, Rejected), message
            if isinstance(message, Tokens):
                made[message.request_id].append(message)
            elif isinstance(message, Finished):
                running.remove(message.request_id)

        self.run(hear, until=lambda: not running)
        return made

    def carry_out(self, session_ids: Iterable[str], action: Action) -> list[CommandDone]:
        """Has a command carried out on several sessions at once and returns the results."""
        waiting = {self.command(session_id, action) for session_id in session_ids}
        results: list[CommandDone] = []

        def hear(message: ToFront) -> None:
            if isinstance(message, CommandDone) and message.command_id in waiting:
                assert message.error is None, message
                waiting.remove(message.command_id)
                results.append(message)

        self.run(hear, until=lambda: not waiting)
        return results

    def close_sessions(self) -> None:
        """Closes every session."""
        self.carry_out(list(self.engine.sessions), Close())


class EvictedAgents:
    """Agents who generate at the same time, in pieces, evicted down to the host between them.

    A piece ends after a number of tokens that is drawn, or is broken off in the middle of a step,
    after which the client comes back with all the context that it knows.

    Args:
        engine: What they run on.
        prompts: One agent each.
        new_tokens: How many tokens each generates.
        piece_tokens: Fewest and most tokens of a piece.
        break_off: Chance that a piece is broken off at any one token.
        seed: Of what is drawn.
    """

    def __init__(
        self,
        engine: BuiltEngine,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
        *,
        piece_tokens: tuple[int, int],
        break_off: float,
        seed: int,
    ) -> None:
        self.broken_off = 0
        self._engine = engine
        self._prompts = prompts
        self._new_tokens = new_tokens
        self._piece_tokens = piece_tokens
        self._break_off = break_off
        self._random = random.Random(seed)
        self._made: list[list[int]] = [[] for _ in prompts]
        self._requests: dict[str, int] = {}

    def run(self) -> list[list[int]]:
        """Runs all agents to their ends and returns the tokens that each generated."""
        for agent in range(len(self._prompts)):
            self._go_on(agent)
        self._engine.run(self._hear, until=self._all_made)
        self._engine.engine.check_integrity()
        return self._made

    def _all_made(self) -> bool:
        return all(len(made) == self._new_tokens for made in self._made)

    def _go_on(self, agent: int) -> None:
        made = self._made[agent]
        request_id = self._engine.submit(
            str(agent),
            [],
            min(self._random.randint(*self._piece_tokens), self._new_tokens - len(made)),
            full_context=[*self._prompts[agent], *made],
        )
        self._requests[request_id] = agent

    def _hear(self, message: ToFront) -> None:
        if isinstance(message, Tokens):
            self._made[self._requests[message.request_id]] += message.token_ids
            if self._random.random() < self._break_off:
                self._engine.engine.handle(Abort(message.request_id))
        elif isinstance(message, Finished | Rejected):
            agent = self._requests.pop(message.request_id)
            if isinstance(message, Rejected):
                assert message.error.reason == "CANCELLED", message
                self.broken_off += 1
            self._engine.command(str(agent), Evict(EvictMode.SCRUB))
        elif isinstance(message, CommandDone):
            assert message.error is None, message
            if len(self._made[int(message.session_id)]) < self._new_tokens:
                self._go_on(int(message.session_id))


def generated_by_transformers(
    config: EngineConfig, prompts: Sequence[Sequence[int]], new_tokens: int
) -> list[list[int]]:
    """Returns what transformers' own `generate` makes of prompts of equal length, in one batch."""
    loaded: LoadedModel = load(config, _tell_nobody)
    model = loaded.model
    model.set_attn_implementation("sdpa")
    model.generation_config.eos_token_id = None
    batch = torch.tensor([list(prompt) for prompt in prompts], device=loaded.device)
    try:
        out = model.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            max_new_tokens=new_tokens,
            do_sample=False,
        )
    finally:
        model.set_attn_implementation(ATTENTION_NAME)
    made: list[list[int]] = out[:, batch.shape[1] :].tolist()
    return made


def _tell_nobody(_what: str, _done: float) -> None:
    return
