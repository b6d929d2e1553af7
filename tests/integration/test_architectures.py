"""Architectures of transformers, from local folders, give the tokens of their own `generate`.

Prompts are prefilled in chunks of random length beside others' decodes, into blocks handed out in
scrambled order from a pool full of NaN.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from services.worker.config import EngineConfig
from services.worker.engine.model_loader import load
from tests.support.model_driver import driving, transformers_greedy

NEW_TOKENS = 32
SHAPE = {
    "vocab_size": 257,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    # Large enough that the likeliest token changes with the context.
    "initializer_range": 0.3,
}
GROUPED = {"num_key_value_heads": 2}


def save(folder: Path, kind: str, settings: dict[str, object]) -> None:
    config = getattr(transformers, kind + "Config")(**(SHAPE | settings))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        pytest.param("Llama", GROUPED, id="llama"),
        pytest.param("Llama", {"head_dim": 24, "attention_bias": True}, id="llama-odd-heads"),
        pytest.param("Qwen2", GROUPED, id="qwen2"),
        pytest.param("Qwen3", GROUPED | {"head_dim": 32}, id="qwen3"),
        pytest.param("Mistral", GROUPED | {"sliding_window": None}, id="mistral"),
        pytest.param("Mistral", GROUPED | {"sliding_window": 256}, id="mistral-window-unreached"),
        pytest.param("Mixtral", GROUPED | {"num_local_experts": 4}, id="mixtral"),
        pytest.param("GPTNeoX", {}, id="gpt-neox"),
        pytest.param("GPTNeoX", {"use_parallel_residual": False}, id="gpt-neox-serial"),
        pytest.param("Phi", {"num_key_value_heads": 2}, id="phi"),
        pytest.param("Phi", {"partial_rotary_factor": 0.5, "qk_layernorm": True}, id="phi-norm"),
        pytest.param("GPT2", {}, id="gpt2-learned-positions"),
    ],
)
def test_tokens_equal_generate(kind: str, settings: dict[str, object], tmp_path: Path) -> None:
    save(tmp_path, kind, settings)
    loaded = load(EngineConfig(model=str(tmp_path)), lambda _what, _fraction: None)
    generator = torch.Generator().manual_seed(1)
    prompts = [
        torch.randint(0, loaded.vocab_size, (length,), generator=generator).tolist()
        for length in (1, 8, 9, 33, 70)
    ]
    expected = [transformers_greedy(loaded, prompt, NEW_TOKENS) for prompt in prompts]
    assert len({tuple(tokens) for tokens in expected}) == len(prompts)
    with driving(loaded) as driver:
        driver.runner.warm_up()
        texts = [driver.text(prompt, NEW_TOKENS) for prompt in prompts]
        assert driver.generate(texts, NEW_TOKENS) == expected
