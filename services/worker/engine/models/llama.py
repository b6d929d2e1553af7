"""The Llama family's forward pass, fused: one product for Q, K and V, one for gate and up.

Between products there is one kernel: residual and norm, activation, or rotation and the writing of
K and V. Where the attention backend rotates (`RotaryBackend`), that is left to it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from services.worker.engine.attention import AttentionBackend, Plan
from services.worker.engine.attention.base import RotaryBackend, RotaryInput
from services.worker.engine.models.fused_ops import fused_ops
from services.worker.engine.models.llama_weights import Linear, LlamaLayer, LlamaWeights


class LlamaModel:
    """A `StepModel` of the Llama family."""

    def __init__(self, weights: LlamaWeights) -> None:
        """Takes weights that are on their device."""
        self._weights = weights
        self._ops = fused_ops(weights.embedding.device)
        self._scale = weights.head_dim**-0.5

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        rows: torch.Tensor,
        attention: AttentionBackend,
        plan: Plan,
    ) -> torch.Tensor:
        """See `StepModel.forward`."""
        weights, ops = self._weights, self._ops
        layers = weights.layers
        attend = (
            _Rotated(weights, attention, plan, positions)
            if isinstance(attention, RotaryBackend)
            else _Plain(weights, attention, plan, positions)
        )
        residual = F.embedding(token_ids, weights.embedding)
        hidden = ops.norm(residual, layers[0].attention_norm, weights.epsilon)
        for index, layer in enumerate(layers):
            qkv = self._linear(hidden, layer.qkv)
            attended = attend(index, layer, qkv, self._scale).view(len(token_ids), -1)
            last = index + 1 == len(layers)
            if last and len(rows) < len(token_ids):
                # Of the others nothing is wanted but their K and V, which are written.
                attended, residual = attended[rows], residual[rows]
            hidden, residual = ops.add_norm(
                self._linear(attended, layer.out), residual, layer.mlp_norm, weights.epsilon
            )
            hidden = ops.silu_multiply(self._linear(hidden, layer.gate_up))
            hidden = self._linear(hidden, layer.down)
            norm = weights.final_norm if last else layers[index + 1].attention_norm
            hidden, residual = ops.add_norm(hidden, residual, norm, weights.epsilon)
        return self._linear(hidden, weights.head)

    def _linear(self, rows: torch.Tensor, linear: Linear) -> torch.Tensor:
        return self._ops.linear(rows, linear.weight, linear.bias)


class _Rotated:
    """Attention by a backend that rotates."""

    def __init__(
        self,
        weights: LlamaWeights,
        backend: RotaryBackend,
        plan: Plan,
        positions: torch.Tensor,
    ) -> None:
        self._weights = weights
        self._backend = backend
        self._plan = plan
        self._positions = positions

    def __call__(
        self, index: int, layer: LlamaLayer, qkv: torch.Tensor, scale: float
    ) -> torch.Tensor:
        weights = self._weights
        source = RotaryInput(
            qkv,
            weights.cos,
            weights.sin,
            self._positions,
            layer.query_norm,
            layer.key_norm,
            weights.epsilon,
        )
        return self._backend.attend_rotary(self._plan, index, source, scale)


class _Plain:
    """Rotation by torch, then attention by any backend."""

    def __init__(
        self,
        weights: LlamaWeights,
        backend: AttentionBackend,
        plan: Plan,
        positions: torch.Tensor,
    ) -> None:
        dtype = weights.embedding.dtype
        self._ops = fused_ops(weights.embedding.device)
        self._weights = weights
        self._backend = backend
        self._plan = plan
        self._cos = weights.cos[positions].to(dtype)[:, None]
        self._sin = weights.sin[positions].to(dtype)[:, None]

    def __call__(
        self, index: int, layer: LlamaLayer, qkv: torch.Tensor, scale: float
    ) -> torch.Tensor:
        weights = self._weights
        queries, keys = weights.num_query_heads, weights.num_kv_heads
        heads = qkv.view(len(qkv), queries + 2 * keys, weights.head_dim)
        turned = heads[:, : queries + keys]
        if layer.query_norm is not None and layer.key_norm is not None:
            query, key = turned.split((queries, keys), dim=1)
            turned = torch.cat(
                (
                    self._ops.norm(query.contiguous(), layer.query_norm, weights.epsilon),
                    self._ops.norm(key.contiguous(), layer.key_norm, weights.epsilon),
                ),
                dim=1,
            )
        low, high = turned.chunk(2, dim=-1)
        turned = torch.cat(
            (low * self._cos - high * self._sin, high * self._cos + low * self._sin), dim=-1
        )
        query, key = turned.split((queries, keys), dim=1)
        return self._backend.attend(
            self._plan, index, query, key, heads[:, queries + keys :], scale
        )
