"""Attention by torch's `varlen_attn` over the paged pool: half precision on a GPU.

It takes a table of blocks from torch 2.13 on, in the implementations of FlashAttention that torch
lets others bring: 3 on Hopper and 4 on Blackwell. Decodes and prompts go in one call per layer.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from services.common.errors import ConfigError
from services.worker.engine.attention.base import AttentionSpec, Plan, StepShape
from services.worker.engine.tensors import upload

_DTYPES = frozenset({torch.bfloat16, torch.float16})
_MOST_HEAD_DIM = 256
# Compute capability -> torch's name of the implementation, and the module it comes with.
_IMPLEMENTATIONS = {9: ("FA3", "flash_attn_interface"), 10: ("FA4", "flash_attn.cute")}
# No limit before a token, nothing after it.
_CAUSAL = (-1, 0)


def why_not(spec: AttentionSpec) -> str | None:
    """Returns why `varlen_attn` cannot serve a model here; None if it can."""
    layout = spec.layout
    if spec.device.type != "cuda":
        return "needs a CUDA device"
    if layout.dtype not in _DTYPES:
        return f"needs bfloat16 or float16, and not {str(layout.dtype).removeprefix('torch.')}"
    if layout.head_dim > _MOST_HEAD_DIM:
        return f"has no kernels for heads of {layout.head_dim} elements"
    attend = _varlen_attn()
    if attend is None or "block_table" not in inspect.signature(attend).parameters:
        return f"torch {torch.__version__} has no varlen_attn that takes a block_table"
    generation = torch.cuda.get_device_capability(spec.device)[0]
    if generation not in _IMPLEMENTATIONS:
        return "needs a Hopper or Blackwell GPU"
    _, module = _IMPLEMENTATIONS[generation]
    if not _is_installed(module):
        return f"{module} is not installed"
    return None


def _varlen_attn() -> Callable[..., Any] | None:
    try:
        module = importlib.import_module("torch.nn.attention.varlen")
    except ImportError:
        return None
    attend: Callable[..., Any] = module.varlen_attn
    return attend


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@dataclass(frozen=True, slots=True)
class _VarlenPlan:
    """A planned step.

    Attributes:
        blocks: int64 ``[T]``, block of each new token's K and V.
        offsets: int64 ``[T]``, its place in that block.
        query_ends: int32 ``[n + 1]``, running sum of new tokens from 0.
        kv_lengths: int32 ``[n]``, tokens of each sequence to attend to.
        tables: int32 ``[n, most blocks]``; what pads a table is not read.
        longest_query: Most new tokens of a sequence.
        longest_kv: Most tokens of a sequence to attend to.
    """

    blocks: torch.Tensor
    offsets: torch.Tensor
    query_ends: torch.Tensor
    kv_lengths: torch.Tensor
    tables: torch.Tensor
    longest_query: int
    longest_kv: int


class TorchVarlenBackend:
    """See the module."""

    name = "torch_varlen"

    def __init__(self, spec: AttentionSpec, kv: torch.Tensor) -> None:
        """Binds the backend to a pool and switches torch to the implementation that it needs.

        Args:
            spec: What stays the same for all steps.
            kv: The device pool as `KVLayout.view` shows it.

        Raises:
            ConfigError: `varlen_attn` cannot serve this model here.
        """
        reason = why_not(spec)
        if reason is not None:
            raise ConfigError(f"--attention {self.name}: {reason}")
        implementation, _ = _IMPLEMENTATIONS[torch.cuda.get_device_capability(spec.device)[0]]
        registry: Any = torch.nn.attention
        if registry.current_flash_attention_impl() != implementation:
            try:
                registry.activate_flash_attention_impl(implementation)
            except (ImportError, RuntimeError, ValueError) as error:
                raise ConfigError(f"--attention {self.name}: {error}") from error
        attend = _varlen_attn()
        assert attend is not None
        self._varlen = attend
        self._device = spec.device
        self._block_size = spec.layout.block_size_tokens
        self._grouped = spec.num_query_heads != spec.layout.num_kv_heads
        self._keys = [kv[:, layer, 0] for layer in range(spec.layout.num_layers)]
        self._values = [kv[:, layer, 1] for layer in range(spec.layout.num_layers)]

    def plan(self, step: StepShape) -> _VarlenPlan:
        """See `AttentionBackend.plan`."""
        blocks, offsets = np.divmod(step.slots, self._block_size)
        ends = np.zeros(len(step.query_lengths) + 1, dtype=np.int32)
        np.cumsum(step.query_lengths, out=ends[1:])
        used = [-(-length // self._block_size) for length in step.kv_lengths]
        tables = np.zeros((len(used), max(used)), dtype=np.int32)
        for row, table, count in zip(tables, step.block_tables, used, strict=True):
            row[:count] = table[:count]
        return _VarlenPlan(
            blocks=upload(blocks, self._device),
            offsets=upload(offsets, self._device),
            query_ends=upload(ends, self._device),
            kv_lengths=upload(np.array(step.kv_lengths, dtype=np.int32), self._device),
            tables=upload(tables, self._device),
            longest_query=max(step.query_lengths),
            longest_kv=max(step.kv_lengths),
        )

    def attend(
        self,
        plan: Plan,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """See `AttentionBackend.attend`."""
        assert isinstance(plan, _VarlenPlan)
        keys, values = self._keys[layer], self._values[layer]
        place = (plan.blocks, plan.offsets)
        keys.index_put_(place, key)
        values.index_put_(place, value)
        # Where blocks are given, lengths of K and V come as counts and not as running sums.
        out: torch.Tensor = self._varlen(
            query.contiguous(),
            keys,
            values,
            plan.query_ends,
            None,
            plan.longest_query,
            plan.longest_kv,
            scale=scale,
            window_size=_CAUSAL,
            enable_gqa=self._grouped,
            seqused_k=plan.kv_lengths,
            block_table=plan.tables,
        )
        return out.contiguous()
