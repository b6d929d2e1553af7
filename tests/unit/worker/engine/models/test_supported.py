"""Models whose layers attend differently are refused by name."""

from __future__ import annotations

import pytest
import transformers

from services.common.errors import ConfigError
from services.worker.engine.models.supported import check_supported


def config(kind: str, **settings: object) -> transformers.PretrainedConfig:
    made: transformers.PretrainedConfig = getattr(transformers, kind + "Config")(**settings)
    return made


@pytest.mark.parametrize(
    "kind", ["Llama", "Qwen2", "Qwen3", "GPTNeoX", "Phi", "Mixtral", "GPT2", "SmolLM3"]
)
def test_plain_causal_attention_is_served(kind: str) -> None:
    check_supported(config(kind), "m", 8192)


@pytest.mark.parametrize(
    ("kind", "settings", "line"),
    [
        ("Gemma2", {}, r"--model m: gemma2 has attention with a soft cap on its scores"),
        ("GptOss", {}, "gpt_oss has attention sinks"),
        ("DeepseekV3", {}, "deepseek_v3 has latent attention"),
        ("Mamba", {}, "mamba has layers of type linear_attention"),
        ("Mamba2", {}, "mamba2 has layers of type linear_attention"),
        ("Jamba", {}, "jamba has state-space layers"),
        ("Qwen3Next", {}, "qwen3_next has linear-attention layers"),
        ("Lfm2", {}, "lfm2 has convolution layers"),
        ("RecurrentGemma", {}, "recurrent_gemma has recurrent layers"),
        ("Llama4Text", {}, "llama4_text has chunked attention"),
        ("Llama4", {}, "llama4 has images in its input"),
        ("T5", {}, "t5 has an encoder and a decoder"),
        ("Falcon", {"alibi": True}, "falcon has ALiBi position biases"),
        ("Bloom", {}, "BloomForCausalLM does not let its attention be replaced"),
        ("ViT", {}, "vit is not a decoder-only language model"),
        ("GPT2", {"add_cross_attention": True}, "gpt2 has cross-attention"),
        (
            "Llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "llama has rotary embeddings of type dynamic",
        ),
    ],
)
def test_other_attention_is_refused_by_name(
    kind: str, settings: dict[str, object], line: str
) -> None:
    with pytest.raises(ConfigError, match=line):
        check_supported(config(kind, **settings), "m", 8192)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("Mistral", {"sliding_window": 4096}),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 0}),
        ("Gemma3Text", {"sliding_window": 4096}),
    ],
)
def test_a_window_is_refused_only_where_a_context_reaches_it(
    kind: str, settings: dict[str, object]
) -> None:
    with pytest.raises(ConfigError, match="sliding window of 4096 tokens: not supported"):
        check_supported(config(kind, **settings), "m", 4097)
    check_supported(config(kind, **settings), "m", 4096)


def test_a_window_that_is_switched_off_does_not_count() -> None:
    check_supported(config("Mistral", sliding_window=None), "m", 100_000)
    check_supported(config("Qwen2", use_sliding_window=False, sliding_window=4), "m", 100_000)
