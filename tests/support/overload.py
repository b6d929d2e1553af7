"""More agents than both pools hold, all alive to the end, who come back again and again."""

from __future__ import annotations

import random
from collections.abc import Callable

from services.worker.messages import Finished, Rejected, ToFront, Tokens
from tests.support.built_engine import BuiltEngine


class Overload:
    """Agents whose contexts together are a multiple of both pools.

    All bring a text at once and generate; when the last is done all come back with a tool's result,
    a few times over. No session is ever closed.

    Args:
        engine: What they run on.
        times: How often both pools' blocks would be full of the agents' contexts.
        context_tokens: Tokens of an agent's context at the end.
        rounds: Requests of each agent.
        new_tokens: Tokens that each request generates.

    Attributes:
        agents: How many there are.
    """

    def __init__(
        self,
        engine: BuiltEngine,
        *,
        times: float,
        context_tokens: int,
        rounds: int,
        new_tokens: int,
    ) -> None:
        ready = engine.ready
        blocks = times * (ready.device_blocks + ready.host_blocks)
        per_agent = context_tokens // ready.block_size_tokens
        self.agents = -int(-blocks // per_agent)
        self._engine = engine
        self._rounds = rounds
        self._new_tokens = new_tokens
        self._appended = context_tokens // rounds - new_tokens
        self._random = random.Random(7)
        self._made = {str(agent): 0 for agent in range(self.agents)}

    def run(self, each_turn: Callable[[], None]) -> dict[str, int]:
        """Runs all agents to their ends; returns how many tokens each session generated.

        Args:
            each_turn: Called after each turn of the engine that makes tokens.
        """
        for _ in range(self._rounds):
            self._run_round(each_turn)
        self._engine.engine.check_integrity()
        return self._made

    def _run_round(self, each_turn: Callable[[], None]) -> None:
        running = {self._submit(name) for name in self._made}

        def hear(message: ToFront) -> None:
            assert not isinstance(message, Rejected), message
            if isinstance(message, Tokens):
                self._made[message.request_id.split("/")[0]] += len(message.token_ids)
                each_turn()
            elif isinstance(message, Finished):
                running.remove(message.request_id)

        self._engine.run(hear, until=lambda: not running)

    def _submit(self, name: str) -> str:
        vocab = self._engine.ready.vocab_size
        text = [self._random.randrange(vocab) for _ in range(self._appended)]
        return self._engine.submit(name, text, self._new_tokens)
