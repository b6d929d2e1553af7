"""The fused forward pass against transformers' own, on tiny models of the family."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from services.worker.engine.model_loader import LoadedModel
from services.worker.engine.model_runner import ModelRunner
from services.worker.engine.models.any import ATTENTION_NAME, register_attention
from services.worker.engine.models.llama import LlamaModel
from services.worker.engine.models.llama_weights import in_family
from services.worker.engine.models.select import fused_model
from tests.support.model_driver import driving, transformers_greedy

TINY = {
    "vocab_size": 160,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS = [
    ("Llama", {}),
    ("Llama", {"tie_word_embeddings": True}),
    ("Llama", {"attention_bias": True, "mlp_bias": True}),
    ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    ("Mistral", {"sliding_window": None}),
    ("Mistral", {"sliding_window": 256}),
    ("Qwen2", {"head_dim": 8}),
    ("Qwen3", {"tie_word_embeddings": True}),
]
PROMPTS = [[(5 * i + n) % 160 for i in range(n)] for n in (50, 9, 21, 1)]


def make(kind: str, settings: dict[str, object], dtype: torch.dtype) -> LoadedModel:
    register_attention()
    config = getattr(transformers, kind + "Config")(**(TINY | settings))
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(
        config, dtype=dtype, attn_implementation=ATTENTION_NAME
    ).eval()
    for name, weight in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            weight.data.add_(torch.randn_like(weight) * 0.3)
    return LoadedModel(
        model=model,
        name=kind,
        vocab_size=config.vocab_size,
        max_context_length=256,
        eos_token_ids=(),
        num_layers=config.num_hidden_layers,
        num_query_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or 8,
        dtype=dtype,
        device=torch.device("cpu"),
        fingerprint="",
    )


@pytest.mark.parametrize(("kind", "settings"), MODELS)
def test_tokens_are_those_of_transformers(kind: str, settings: dict[str, object]) -> None:
    loaded = make(kind, settings, torch.float32)
    expected = [transformers_greedy(loaded, prompt, 24) for prompt in PROMPTS]
    with driving(loaded) as driver:
        assert in_family(loaded.model, 256)
        driver.runner.warm_up()
        texts = [driver.text(prompt, 24) for prompt in PROMPTS]
        assert driver.generate(texts, 24) == expected
    # The modules share the joined weights and still work.
    assert [transformers_greedy(loaded, prompt, 24) for prompt in PROMPTS] == expected
    assert len({tuple(tokens) for tokens in expected}) > 1


def test_the_models_own_modules_give_the_same() -> None:
    loaded = make("Qwen3", {}, torch.float32)
    made = []
    for any_model in (False, True):
        with driving(loaded) as driver:
            driver.runner = ModelRunner(
                loaded,
                driver.layout,
                driver.layout.view(driver.pool),
                driver.stream,
                any_model=any_model,
            )
            driver.runner.warm_up()
            made.append(driver.generate([driver.text(prompt, 9) for prompt in PROMPTS], 9))
    assert made[0] == made[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_like_the_models_own(dtype: torch.dtype) -> None:
    with driving(make("Qwen3", {}, dtype)) as driver:
        driver.runner.warm_up()


def test_weights_are_held_once() -> None:
    model = make("Qwen2", {"head_dim": 8}, torch.float32).model
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    fused = fused_model(model, 256)
    assert isinstance(fused, LlamaModel)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight, before[name], rtol=0, atol=0)
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    storages = [
        {part.weight.untyped_storage().data_ptr() for part in parts}
        for parts in (
            (attention.q_proj, attention.k_proj, attention.v_proj),
            (mlp.gate_proj, mlp.up_proj),
        )
    ]
    assert [len(found) for found in storages] == [1, 1]
    fused_model(model, 256)
    assert attention.q_proj.weight.untyped_storage().data_ptr() in storages[0]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("Mistral", {"sliding_window": 255}),
        ("Llama", {"hidden_act": "gelu"}),
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
        ("Granite", {}),
    ],
)
def test_others_keep_their_own_modules(kind: str, settings: dict[str, object]) -> None:
    assert fused_model(make(kind, settings, torch.float32).model, 256) is None
