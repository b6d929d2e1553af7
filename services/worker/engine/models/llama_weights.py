"""Weights of the Llama family as the fused forward pass wants them.

Llama, Mistral, Qwen2 and Qwen3 are one decoder with small differences: biases, and norms of Q and
K. Their Q, K and V projections are joined into one matrix, and gate and up into another. The
modules of transformers keep working on slices of the joined matrices, so nothing is held twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

# Architecture -> class of its attention, which must be what the layers have.
_FAMILY = {
    "LlamaForCausalLM": "LlamaAttention",
    "MistralForCausalLM": "MistralAttention",
    "Qwen2ForCausalLM": "Qwen2Attention",
    "Qwen3ForCausalLM": "Qwen3Attention",
}
_LENGTH_FREE_ROPE = frozenset({"default", "linear", "llama3", "yarn"})


@dataclass(frozen=True, slots=True)
class Linear:
    """A projection.

    Attributes:
        weight: ``[out, in]``.
        bias: ``[out]``, or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class LlamaLayer:
    """One layer.

    Attributes:
        attention_norm: Before attention, ``[hidden]``.
        qkv: Q, K and V of all heads, in this order.
        query_norm: Norm of each head of Q, ``[head_dim]``; None if there is none.
        key_norm: Norm of each head of K, ``[head_dim]``; None if there is none.
        out: After attention.
        mlp_norm: Before the MLP, ``[hidden]``.
        gate_up: The gate's projection, then the other.
        down: Back to the hidden size.
    """

    attention_norm: torch.Tensor
    qkv: Linear
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    out: Linear
    mlp_norm: torch.Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class LlamaWeights:
    """A model of the family.

    Attributes:
        embedding: ``[vocab_size, hidden]``.
        layers: First to last.
        final_norm: ``[hidden]``.
        head: To logits; may share `embedding`'s memory.
        epsilon: Added to the mean square in every norm.
        cos: float32 ``[positions, head_dim / 2]``.
        sin: As `cos`.
        num_query_heads: Heads of Q.
        num_kv_heads: Heads of K and of V.
        head_dim: Elements per head.
    """

    embedding: torch.Tensor
    layers: tuple[LlamaLayer, ...]
    final_norm: torch.Tensor
    head: Linear
    epsilon: float
    cos: torch.Tensor
    sin: torch.Tensor
    num_query_heads: int
    num_kv_heads: int
    head_dim: int


def in_family(model: PreTrainedModel, max_context_length: int) -> bool:
    """Returns True if `take_weights` and the fused forward pass fit the model.

    Args:
        model: Any model.
        max_context_length: A sliding window at least this long changes nothing.
    """
    attention = _FAMILY.get(type(model).__name__)
    if attention is None:
        return False
    config = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") not in _LENGTH_FREE_ROPE:
        return False
    if rope.get("partial_rotary_factor", 1.0) != 1.0 or config.hidden_act != "silu":
        return False
    for layer in model.model.layers:
        if type(layer.self_attn).__name__ != attention:
            return False
        window = getattr(layer.self_attn, "sliding_window", None)
        if window is None and attention == "MistralAttention":
            window = getattr(config, "sliding_window", None)
        if window is not None and window < max_context_length:
            return False
    return True


@torch.no_grad()
def take_weights(model: PreTrainedModel, max_context_length: int) -> LlamaWeights:
    """Joins a model's projections in place, layer by layer.

    Args:
        model: One that `in_family` accepts; its modules end up with slices of the joined weights.
        max_context_length: Positions that are needed.
    """
    config, inner = model.config, model.model
    heads = config.num_attention_heads
    layers = []
    for layer in inner.layers:
        attention, mlp = layer.self_attn, layer.mlp
        layers.append(
            LlamaLayer(
                attention_norm=layer.input_layernorm.weight.detach(),
                qkv=_join([attention.q_proj, attention.k_proj, attention.v_proj]),
                query_norm=_norm(attention, "q_norm"),
                key_norm=_norm(attention, "k_norm"),
                out=_linear(attention.o_proj),
                mlp_norm=layer.post_attention_layernorm.weight.detach(),
                gate_up=_join([mlp.gate_proj, mlp.up_proj]),
                down=_linear(mlp.down_proj),
            )
        )
    cos, sin = _rotary_tables(inner.rotary_emb, max_context_length)
    return LlamaWeights(
        embedding=inner.embed_tokens.weight.detach(),
        layers=tuple(layers),
        final_norm=inner.norm.weight.detach(),
        head=_linear(model.lm_head),
        epsilon=config.rms_norm_eps,
        cos=cos,
        sin=sin,
        num_query_heads=heads,
        num_kv_heads=config.num_key_value_heads or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
    )


def _linear(module: torch.nn.Module) -> Linear:
    assert isinstance(module, torch.nn.Linear)
    bias = _bias(module)
    return Linear(module.weight.detach(), None if bias is None else bias.detach())


def _bias(module: torch.nn.Linear) -> torch.nn.Parameter | None:
    # torch's types know of no layer without one.
    bias: torch.nn.Parameter | None = module.bias
    return bias


def _norm(module: torch.nn.Module, name: str) -> torch.Tensor | None:
    norm = getattr(module, name, None)
    if norm is None:
        return None
    weight: torch.Tensor = norm.weight.detach()
    return weight


def _join(modules: Sequence[torch.nn.Linear]) -> Linear:
    weight = _join_tensors([_parameter(module.weight) for module in modules])
    biases = [bias for module in modules if (bias := _bias(module)) is not None]
    assert len(biases) in {0, len(modules)}
    return Linear(weight, _join_tensors(biases) if biases else None)


def _parameter(weight: torch.Tensor) -> torch.nn.Parameter:
    assert isinstance(weight, torch.nn.Parameter)
    return weight


def _join_tensors(parts: Sequence[torch.nn.Parameter]) -> torch.Tensor:
    """Puts tensors behind each other in memory, unless they are, and returns them as one."""
    rows = [part.shape[0] for part in parts]
    if _joined(parts):
        first = parts[0].detach()
        return first.as_strided((sum(rows), *first.shape[1:]), first.stride())
    joined = torch.cat([part.detach() for part in parts])
    for part, piece in zip(parts, joined.split(rows), strict=True):
        part.data = piece
    return joined


def _joined(parts: Sequence[torch.nn.Parameter]) -> bool:
    end = parts[0].storage_offset()
    for part in parts:
        same = part.untyped_storage().data_ptr() == parts[0].untyped_storage().data_ptr()
        if not same or not part.is_contiguous() or part.storage_offset() != end:
            return False
        end += part.numel()
    return True


def _rotary_tables(rotary: torch.nn.Module, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    frequencies = rotary.inv_freq
    assert isinstance(frequencies, torch.Tensor)
    scaling = rotary.attention_scaling
    assert isinstance(scaling, float | int)
    places = torch.arange(positions, device=frequencies.device, dtype=torch.float32)
    angles = places[:, None] * frequencies.float()
    return angles.cos() * scaling, angles.sin() * scaling
