"""SmolLM2 through the engine, evicted at random, against transformers' own `generate`."""

from __future__ import annotations

import random

import pytest

from services.worker.config import EngineConfig
from tests.support.built_engine import BuiltEngine, EvictedAgents, generated_by_transformers

NEW_TOKENS = 64
# Eight prompts of each length, so that `generate` needs no padding.
LENGTHS = (9, 33, 64, 120)
CONFIG = EngineConfig(
    model="smollm2",
    dtype="float32",
    # About a third of what the prompts and their continuations fill.
    device_pool_gib=120 * 16 * 46_080 / 2**30,
    host_pool_gib=1.0,
    max_step_tokens=192,
    max_context_length=512,
)
TEXT = """An agent reasons about what it was asked, calls a tool, waits, and reflects on what came
back. While it waits, its memory of the conversation lies idle. The little lighthouse keeper wrote
every ship's name into a book, and at night she read them aloud to the sea. Mix flour, salt, water
and a spoon of honey; let the dough rest until it has doubled, then bake it hot. In 1969 two people
walked on the moon while a third went round it alone, further from everyone than anybody before."""


def prompts_of(token_ids: list[int]) -> list[list[int]]:
    """Returns eight different prompts of each length, cut from a text."""
    rng = random.Random(7)
    found = []
    for length in LENGTHS:
        for _ in range(8):
            start = rng.randrange(len(token_ids))
            found.append([token_ids[(start + i) % len(token_ids)] for i in range(length)])
    return found


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_tokens_equal_those_of_generate_whatever_is_evicted() -> None:
    from transformers import AutoTokenizer

    from services.common.model_files import tokenizer_source

    engine = BuiltEngine(CONFIG)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_source("smollm2"))
    prompts = prompts_of(tokenizer(TEXT, add_special_tokens=False)["input_ids"])
    agents = EvictedAgents(
        engine, prompts, NEW_TOKENS, piece_tokens=(8, 40), break_off=0.02, seed=11
    )
    made = agents.run()
    counters = engine.engine.report().counters
    engine.close()
    assert len(prompts) == 32
    assert agents.broken_off > 0
    assert counters.evictions >= 32
    assert counters.loads >= 32
    assert counters.preemptions + counters.evictions > 64
    expected = []
    for first in range(0, len(prompts), 8):
        expected += generated_by_transformers(CONFIG, prompts[first : first + 8], NEW_TOKENS)
    assert made == expected
