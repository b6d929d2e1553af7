"""Models of real shapes with random weights: ``dummy:<name>``, seeded, made on the device.

They serve speed measurements and tests. They have no tokenizer and no end-of-sequence token.
"""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from services.common.errors import ConfigError
from services.common.model_files import DUMMY_PREFIX

_WEIGHT_SCALE = 0.02


def _llama(**shape: object) -> LlamaConfig:
    return LlamaConfig(
        bos_token_id=None, eos_token_id=None, pad_token_id=None, tie_word_embeddings=False, **shape
    )


def _llama_2_7b() -> LlamaConfig:
    return _llama(
        vocab_size=32_000,
        hidden_size=4096,
        intermediate_size=11_008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    )


def _llama_3_8b() -> LlamaConfig:
    return _llama(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=32_768,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
    )


def _tiny() -> LlamaConfig:
    return _llama(
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
    )


_SHAPES = {"llama-2-7b": _llama_2_7b, "llama-3-8b": _llama_3_8b, "tiny": _tiny}


def dummy_config(model: str) -> PretrainedConfig:
    """Returns the shape that a name stands for.

    Args:
        model: ``dummy:<name>``.

    Raises:
        ConfigError: There is no such shape.
    """
    name = model.removeprefix(DUMMY_PREFIX)
    if name not in _SHAPES:
        known = ", ".join(DUMMY_PREFIX + shape for shape in _SHAPES)
        raise ConfigError(f"--model {model}: unknown shape, use one of {known}")
    return _SHAPES[name]()


def make_model(
    config: PretrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    attention_name: str,
) -> PreTrainedModel:
    """Returns a model with random weights, made directly on the device.

    Args:
        config: Its shape.
        dtype: Element type of the weights.
        device: Where they are made; another device gives other weights for the same seed.
        seed: Seeds them.
        attention_name: ``attn_implementation``.
    """
    generator = torch.Generator(device).manual_seed(seed)
    with torch.device(device), no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention_name
        )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0.0, _WEIGHT_SCALE, generator=generator)
            elif name.endswith("bias"):
                weight.zero_()
            else:
                weight.fill_(1.0)
    return model.eval()
