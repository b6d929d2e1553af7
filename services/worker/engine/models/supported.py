"""Which models are served: those whose layers all attend causally to all that came before.

Others would give wrong tokens, so they are refused by name at the start, from the configuration
as far as it tells, and by `CheckedAttention` when the runner warms up.
"""

from __future__ import annotations

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from services.common.errors import ConfigError

_FULL = "full_attention"
_SLIDING = "sliding_attention"
# Rotary frequencies that change with the longest position of a batch would let one sequence
# change another's, and would not fit keys that are kept.
_ROPE_BY_LENGTH = frozenset({"dynamic", "longrope"})

# Attribute of a configuration that is set if a model has the feature.
_FEATURES = {
    "kv_lora_rank": "latent attention",
    "attn_logit_softcapping": "attention with a soft cap on its scores",
    "attention_chunk_size": "chunked attention",
    "alibi": "ALiBi position biases",
    "vision_config": "images in its input",
    "audio_config": "sound in its input",
    "ssm_cfg": "state-space layers",
    "mamba_d_state": "state-space layers",
    "ssm_state_size": "state-space layers",
    "lru_width": "recurrent layers",
    "conv_L_cache": "convolution layers",
    "linear_conv_kernel_dim": "linear-attention layers",
    "cross_attention_layers": "cross-attention",
    "add_cross_attention": "cross-attention",
    "is_encoder_decoder": "an encoder and a decoder",
}
_SINK_MODELS = frozenset({"gpt_oss"})


def check_supported(config: PretrainedConfig, name: str, max_context_length: int) -> None:
    """Refuses a model that attends in a way that the KV pool's layout does not know.

    Args:
        config: The model's configuration.
        name: As in ``--model``, for the error.
        max_context_length: A sliding window at least this long changes nothing.

    Raises:
        ConfigError: Names the feature.
    """
    feature = _feature(config)
    if feature is not None:
        raise ConfigError(f"--model {name}: {config.model_type} has {feature}: not supported")
    window = _window(config)
    if window is not None and window < max_context_length:
        raise ConfigError(
            f"--model {name}: {config.model_type} has a sliding window of {window} tokens: not"
            f" supported, except that --max-context-length {window} or less never reaches it"
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigError(
            f"--model {name}: {config.model_type} is not a decoder-only language model"
        )
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if isinstance(architecture, tuple):
        architecture = architecture[0]
    if not getattr(architecture, "_supports_attention_backend", False):
        raise ConfigError(
            f"--model {name}: transformers' {architecture.__name__} does not let its attention"
            " be replaced"
        )


def _feature(config: PretrainedConfig) -> str | None:
    if config.model_type in _SINK_MODELS:
        return "attention sinks"
    for attribute, feature in _FEATURES.items():
        if getattr(config, attribute, None):
            return f"{feature} ({attribute})"
    if getattr(config, "is_causal", True) is False:
        return "attention that is not causal"
    other = sorted(set(getattr(config, "layer_types", None) or ()) - {_FULL, _SLIDING})
    if other:
        return f"layers of type {', '.join(other)}"
    return _rope_by_length(config)


def _window(config: PretrainedConfig) -> int | None:
    """Returns how many tokens back a windowed layer sees; None if all see everything."""
    if getattr(config, "use_sliding_window", True) is False:
        return None
    types = getattr(config, "layer_types", None)
    if types and _SLIDING not in types:
        return None
    window: int | None = getattr(config, "sliding_window", None)
    return window


def _rope_by_length(config: PretrainedConfig) -> str | None:
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    for part in kinds:
        if part.get("rope_type") in _ROPE_BY_LENGTH:
            return f"rotary embeddings of type {part['rope_type']}, which depend on the batch"
    return None
