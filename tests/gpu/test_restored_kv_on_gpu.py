"""Evicted and restored KV is the same to the last bit, and so is what comes of it.

In bfloat16 by FlashInfer and CUDA graphs, as it is served.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from services.worker.config import EngineConfig
from services.worker.messages import (
    CommandDone,
    Evict,
    EvictMode,
    Finished,
    Rejected,
    Restore,
    ToFront,
)
from tests.support.built_engine import BuiltEngine
from tests.support.small_llama import MAX_CONTEXT, VOCAB, kv_layout, write_small_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

LAYOUT = kv_layout(16, torch.bfloat16)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BuiltEngine]:
    engine = BuiltEngine(
        EngineConfig(
            model=write_small_llama(tmp_path_factory.mktemp("model")),
            device="cuda",
            dtype="bfloat16",
            attention="flashinfer",
            block_size_tokens=LAYOUT.block_size_tokens,
            device_pool_gib=160 * LAYOUT.block_bytes / 2**30,
            host_pool_gib=2000 * LAYOUT.block_bytes / 2**30,
            max_context_length=MAX_CONTEXT,
            max_running_sequences=16,
            low_watermark=0.0,
        )
    )
    yield engine
    engine.close()


@pytest.fixture
def engine(built: BuiltEngine) -> Iterator[BuiltEngine]:
    """The module's engine, without sessions before and after."""
    yield built
    built.close_sessions()
    built.engine.check_integrity()


class BusyAgents:
    """Agents who generate, are evicted and wake at the same time, as fast as it goes.

    Before each eviction a digest of an agent's KV is taken. Its next request restores it, whether a
    `Restore` came before or not, and adds to it; when that ends, the KV of the tokens from before
    must have the same digest. Meanwhile other agents' KV was where its own had been.

    Attributes:
        compared: How often each agent's KV was found the same.
        digests: Every digest there was.

    Args:
        engine: What they run on; the device holds about a third of them.
        agents: How many.
        rounds: How often each is compared.
    """

    def __init__(self, engine: BuiltEngine, agents: int, rounds: int) -> None:
        self.compared: Counter[str] = Counter()
        self.digests: set[bytes] = set()
        self._engine = engine
        self._agents = agents
        self._rounds = rounds
        self._random = random.Random(17)
        self._before: dict[str, tuple[int, bytes]] = {}
        self._evictions: set[str] = set()

    def run(self) -> None:
        """Runs until each agent was compared often enough."""
        for agent in range(self._agents):
            self._go_on(str(agent), self._random.randint(100, 300))
        self._engine.run(
            self._hear, until=lambda: self.compared.total() == self._agents * self._rounds
        )

    def _hear(self, message: ToFront) -> None:
        assert not isinstance(message, Rejected), message
        if isinstance(message, Finished):
            self._leave(message.request_id.split("/", maxsplit=1)[0])
        elif isinstance(message, CommandDone) and message.command_id in self._evictions:
            assert message.error is None, message
            if self._random.random() < 0.5:
                self._engine.command(message.session_id, Restore())
            self._go_on(message.session_id, self._random.randint(1, 16))

    def _go_on(self, name: str, new_prompt_tokens: int) -> None:
        append = [self._random.randrange(VOCAB) for _ in range(new_prompt_tokens)]
        self._engine.submit(name, append, self._random.randint(2, 10))

    def _leave(self, name: str) -> None:
        """Compares an agent's KV with what it was before its last eviction, and evicts it."""
        self._engine.settle()
        if name in self._before:
            tokens, digest = self._before[name]
            assert self._digest(name, tokens) == digest, f"session {name}"
            self.compared[name] += 1
        if self.compared[name] == self._rounds:
            return
        tokens = self._engine.engine.sessions[name].kv.tokens
        self._before[name] = tokens, self._digest(name, tokens)
        mode = self._random.choice(list(EvictMode))
        self._evictions.add(self._engine.command(name, Evict(mode)))

    def _digest(self, name: str, tokens: int) -> bytes:
        """Returns a digest of the KV of a session's first tokens, in their order."""
        slots = list(self._engine.engine.sessions[name].kv.slots)
        blocks = LAYOUT.view(self._engine.device_pool)[slots]
        data = blocks.movedim(3, 1).flatten(0, 1)[:tokens].contiguous().view(torch.uint8)
        digest = hashlib.sha256(data.cpu().numpy().tobytes()).digest()
        self.digests.add(digest)
        return digest


def test_kv_is_bit_identical_after_restore_under_load(engine: BuiltEngine) -> None:
    agents, rounds = 24, 20
    loads = engine.engine.report().counters.loads
    busy = BusyAgents(engine, agents, rounds)
    busy.run()
    assert engine.engine.report().counters.loads - loads >= agents * rounds // 2
    # Each time the context is another one, and so is the digest.
    assert len(busy.digests) == agents * rounds


def converse(
    engine: BuiltEngine, salt: str, *, evict: bool
) -> list[list[tuple[list[int], list[bytes]]]]:
    """Has eight agents talk three times, all at once; returns tokens and logits of each reply."""
    rng = random.Random(5)
    names = [f"{salt}{agent}" for agent in range(8)]
    replies = []
    for longest in (60, 20, 1):
        # Handed in together, and all replies of one length: each step has the same shape each time.
        request_ids = [
            engine.submit(
                name,
                [rng.randrange(VOCAB) for _ in range(rng.randint(1, longest))],
                12,
                cache_salt=salt,
                return_logits=True,
            )
            for name in names
        ]
        made = engine.generate(request_ids)
        replies.append(
            [
                (
                    [token for part in parts for token in part.token_ids],
                    [row for part in parts for row in part.logits],
                )
                for parts in made.values()
            ]
        )
        if evict:
            engine.carry_out(names, Evict(EvictMode.SCRUB))
            restored = engine.carry_out(names, Restore())
            assert all(result.moved_blocks == result.kv.total_blocks for result in restored)
    return replies


def test_tokens_and_logits_are_those_of_agents_who_were_never_evicted(engine: BuiltEngine) -> None:
    evictions = engine.engine.report().counters.evictions
    undisturbed = converse(engine, "undisturbed", evict=False)
    assert engine.engine.report().counters.evictions == evictions
    engine.close_sessions()
    assert converse(engine, "evicted", evict=True) == undisturbed
