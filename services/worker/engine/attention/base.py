"""What an attention backend is asked to do.

A step is planned once: `AttentionBackend.plan` turns the host's block tables into whatever the
kernels want, and all layers then use the same `Plan`. `attend` runs once per layer and only
launches kernels, so that it can be captured in a CUDA graph. A backend that is captured keeps the
buffers its kernels read and writes every plan into them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from services.worker.engine.kv_layout import KVLayout


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What stays the same for all steps.

    Attributes:
        layout: How a block's bytes are KV.
        num_query_heads: Heads of Q; a multiple of the layout's KV heads.
        device: Where Q, K, V and the pool are.
    """

    layout: KVLayout
    num_query_heads: int
    device: torch.device


@dataclass(frozen=True, slots=True)
class StepShape:
    """Which tokens a step computes and where their KV lies: host data, no tensors.

    The tokens of all sequences lie one sequence after another in one flat row of T tokens.

    Attributes:
        query_lengths: New tokens of each sequence, at least 1.
        kv_lengths: Tokens of each sequence whose KV is in the pool after the step.
        block_tables: Block ids of each sequence, at least ``kv_length`` tokens long.
        num_decodes: This many sequences, the first ones, have one new token.
        slots: int64 ``[T]``, where each new token's KV goes: block id * block size + offset.
    """

    query_lengths: list[int]
    kv_lengths: list[int]
    block_tables: Sequence[Sequence[int]]
    num_decodes: int
    slots: npt.NDArray[np.int64]


class Plan(Protocol):
    """A backend's own form of a `StepShape`."""


class AttentionBackend(Protocol):
    """Writes K and V into the pool and attends to what is there.

    All calls come from the compute stream's context, one step after another.
    """

    name: str

    def plan(self, step: StepShape) -> Plan:
        """Prepares one step for all its layers."""

    def attend(
        self,
        plan: Plan,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Writes one layer's new K and V into the pool, then attends causally.

        Args:
            plan: What `plan` returned for this step.
            layer: Index of the layer, below `KVLayout.num_layers`.
            query: ``[T, num_query_heads, head_dim]``, any strides.
            key: ``[T, num_kv_heads, head_dim]``, any strides.
            value: As `key`.
            scale: Factor for the products of Q and K.

        Returns:
            ``[T, num_query_heads, head_dim]``, contiguous; valid until the next call.
        """


@dataclass(frozen=True, slots=True)
class RotaryInput:
    """One layer's Q, K and V before their rotation.

    Attributes:
        qkv: ``[T, num_query_heads + 2 * num_kv_heads, head_dim]`` in one flat row per token.
        cos: float32 ``[positions, head_dim / 2]``.
        sin: As `cos`.
        positions: int64 ``[T]``.
        query_norm: ``[head_dim]``, norm of each head of Q before it is rotated; None: there is
            none, neither for Q nor for K.
        key_norm: ``[head_dim]``, the same for K.
        epsilon: Added to the mean square in these norms.
    """

    qkv: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    positions: torch.Tensor
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    epsilon: float


@runtime_checkable
class RotaryBackend(AttentionBackend, Protocol):
    """A backend that rotates Q and K in the kernel that writes K and V."""

    def attend_rotary(
        self, plan: Plan, layer: int, source: RotaryInput, scale: float
    ) -> torch.Tensor:
        """Rotates one layer's Q and K, then does what `attend` does.

        Args:
            plan: What `plan` returned for this step.
            layer: Index of the layer, below `KVLayout.num_layers`.
            source: Q, K and V.
            scale: Factor for the products of Q and K.

        Returns:
            As `attend`.
        """


class BackendFactory(Protocol):
    """Makes a backend for a pool."""

    def __call__(self, spec: AttentionSpec, kv: torch.Tensor) -> AttentionBackend:
        """Returns the backend.

        Args:
            spec: What stays the same for all steps.
            kv: The device pool as `KVLayout.view` shows it.
        """
