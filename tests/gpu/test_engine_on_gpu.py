"""The engine on real CUDA streams, evicted at random, against transformers' `generate`."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from services.worker.config import EngineConfig
from tests.support.built_engine import BuiltEngine, EvictedAgents, generated_by_transformers
from tests.support.small_llama import VOCAB, kv_layout, write_small_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

AGENTS = 16
PROMPT_TOKENS = 64
NEW_TOKENS = 32
LAYOUT = kv_layout(16, torch.float32)


def test_tokens_equal_those_of_generate_whatever_is_evicted(tmp_path: Path) -> None:
    config = EngineConfig(
        model=write_small_llama(tmp_path),
        device="cuda",
        dtype="float32",
        attention="sdpa",
        block_size_tokens=LAYOUT.block_size_tokens,
        # Less than half of what the agents fill.
        device_pool_gib=40 * LAYOUT.block_bytes / 2**30,
        host_pool_gib=0.1,
        max_context_length=2 * PROMPT_TOKENS,
    )
    rng = random.Random(3)
    prompts = [[rng.randrange(VOCAB) for _ in range(PROMPT_TOKENS)] for _ in range(AGENTS)]
    engine = BuiltEngine(config)
    agents = EvictedAgents(engine, prompts, NEW_TOKENS, piece_tokens=(4, 12), break_off=0.1, seed=4)
    made = agents.run()
    counters = engine.engine.report().counters
    engine.close()
    assert agents.broken_off > 0
    assert counters.evictions > 2 * AGENTS
    assert counters.loads > 2 * AGENTS
    assert made == generated_by_transformers(config, prompts, NEW_TOKENS)
    assert len({tuple(tokens) for tokens in made}) == AGENTS
