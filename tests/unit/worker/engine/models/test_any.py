"""What is found at warm-up: layers that ask their attention for more than it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig

from services.common.errors import ConfigError
from services.worker.engine.model_loader import LoadedModel
from services.worker.engine.models.any import ATTENTION_NAME, register_attention
from tests.support.model_driver import driving

TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def loaded_from(kind: str, **settings: object) -> LoadedModel:
    """A model whose configuration nobody has checked."""
    register_attention()
    config: PretrainedConfig = getattr(transformers, kind + "Config")(**(TINY | settings))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=ATTENTION_NAME
    ).eval()
    heads = config.num_attention_heads
    return LoadedModel(
        model=model,
        name="m",
        vocab_size=config.vocab_size,
        max_context_length=64,
        eos_token_ids=(),
        num_layers=config.num_hidden_layers,
        num_query_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        dtype=torch.float32,
        device=torch.device("cpu"),
        fingerprint="",
    )


def warm_up(loaded: LoadedModel) -> None:
    with driving(loaded) as driver:
        driver.runner.warm_up()


GROUPED = {"num_key_value_heads": 2, "head_dim": 16}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("Llama", GROUPED),
        ("Qwen3", GROUPED),
        ("Olmo2", {"num_key_value_heads": 2}),
        ("Granite", {"num_key_value_heads": 1}),
        ("Mixtral", GROUPED | {"num_local_experts": 4}),
        ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
        ("GPT2", {}),
    ],
)
def test_plain_models_pass(kind: str, settings: dict[str, object]) -> None:
    warm_up(loaded_from(kind, **settings))


@pytest.mark.parametrize(
    ("kind", "settings", "line"),
    [
        (
            "Mistral",
            GROUPED | {"sliding_window": 8},
            "--model m: MistralAttention attends with sliding_window=8",
        ),
        ("Gemma2", GROUPED | {"sliding_window": 64}, "Gemma2Attention attends with softcap=50.0"),
        ("Bert", {"is_decoder": False}, "not supported"),
        ("Bloom", {"n_layer": 2, "n_head": 4}, "--model m: .*not supported"),
    ],
)
def test_a_model_that_attends_in_its_own_way_is_refused(
    kind: str, settings: dict[str, object], line: str
) -> None:
    loaded = loaded_from(kind, **settings)
    with pytest.raises(ConfigError, match=line):
        warm_up(loaded)


def test_a_layer_that_does_not_use_the_interface_is_noticed() -> None:
    loaded = loaded_from("Llama")

    class NoAttention(torch.nn.Module):
        def forward(
            self, hidden_states: torch.Tensor, **_kwargs: object
        ) -> tuple[torch.Tensor, None]:
            return hidden_states, None

    loaded.model.model.layers[1].self_attn = NoAttention()
    with pytest.raises(ConfigError, match="1 of 2 layers attend through"):
        warm_up(loaded)


def spoil_rotary(model: Any) -> None:
    model.model.rotary_emb.forward = lambda x, position_ids: (
        torch.ones(1, position_ids.shape[1], 8) * (1 if position_ids[0, 0] else 0.2),
        torch.zeros(1, position_ids.shape[1], 8),
    )


@pytest.mark.parametrize("spoil", [spoil_rotary])
def test_logits_unlike_those_of_the_models_own_attention_are_noticed(
    spoil: Callable[[Any], None],
) -> None:
    loaded = loaded_from("Llama", initializer_range=0.5)
    spoil(loaded.model)
    with pytest.raises(ConfigError, match="its layers attend in a way of their own"):
        warm_up(loaded)
