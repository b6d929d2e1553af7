"""Attention by torch's `scaled_dot_product_attention` over gathered blocks: runs everywhere.

Decodes go together, in groups of like length: one `index_select` gathers a layer's K and V of a
whole group into one buffer that all layers share, so that it stays in the CPU's cache. The query
heads that share a KV head are rows of one query, which repeats no K and no V. Longer slices go one
by one.

Slots past a sequence's end may hold anything, NaN as well, and NaN times a weight of zero is NaN:
they are zeroed after the gather as well as masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from services.worker.engine.attention.base import AttentionSpec, Plan, StepShape
from services.worker.engine.tensors import upload

# A group's sequences are padded to its longest. A sequence shorter by more than this share of it
# starts a group of its own, unless the difference is below the token count.
_PADDING_SHARE = 0.25
_PADDING_TOKENS = 64
# Most that a group gathers at once; a single sequence may need more.
_GATHER_BYTES = 128 << 20


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    """Sequences of one new token each, padded to the length of the longest.

    Attributes:
        rows: Which tokens of the step: a range, or int64 indices.
        size: How many they are.
        kv_tokens: Length they are padded to, a multiple of the block size.
        blocks: int64 ``[num_layers, 2 * size * blocks each]``, what to gather: all K, then all V.
        empty: int64, tokens of the gathered ``[2 * size * kv_tokens]`` past a sequence's end.
        mask: ``[size, 1, 1, kv_tokens]``, added to the scores; None if all is to be seen.
    """

    rows: slice | torch.Tensor
    size: int
    kv_tokens: int
    blocks: torch.Tensor
    empty: torch.Tensor | None
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class _Chunk:
    """One sequence with several new tokens.

    Attributes:
        rows: Which tokens of the step.
        kv_tokens: Tokens to attend to.
        blocks: int64 ``[num_layers, 2 * blocks]``, what to gather; None if the new tokens are all
            there is.
        mask: ``[new tokens, kv_tokens]``, added to the scores; None where `blocks` is.
    """

    rows: slice
    kv_tokens: int
    blocks: torch.Tensor | None
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class _SdpaPlan:
    """A planned step.

    Attributes:
        new_rows: int64 ``[num_layers, 2, T]``, where K and V of the new tokens go.
    """

    new_rows: torch.Tensor
    groups: list[_DecodeGroup]
    chunks: list[_Chunk]


def group_by_length(lengths: Sequence[int], most_tokens: int) -> list[list[int]]:
    """Groups sequences so that padding each group to its longest wastes little.

    Args:
        lengths: Length of each sequence in tokens.
        most_tokens: Most tokens of a group, padding included, unless it is one sequence.

    Returns:
        Indices into `lengths`, each once; one group in the given order if one is enough.
    """
    if not lengths:
        return []
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    groups: list[list[int]] = []
    longest, shortest_allowed = 0, 0.0
    for i in order:
        full = groups and (len(groups[-1]) + 1) * longest > most_tokens
        if not groups or full or lengths[i] < shortest_allowed:
            groups.append([])
            longest = lengths[i]
            shortest_allowed = longest - max(longest * _PADDING_SHARE, _PADDING_TOKENS)
        groups[-1].append(i)
    return [sorted(group) for group in groups]


class SdpaBackend:
    """See the module."""

    name = "sdpa"

    def __init__(self, spec: AttentionSpec, kv: torch.Tensor) -> None:
        """Binds the backend to a pool.

        Args:
            spec: What stays the same for all steps.
            kv: The device pool as `KVLayout.view` shows it; contiguous.
        """
        layout = spec.layout
        self._layout = layout
        self._device = spec.device
        self._query_heads = spec.num_query_heads
        self._heads_per_kv = spec.num_query_heads // layout.num_kv_heads
        row = layout.num_kv_heads * layout.head_dim
        # The pool as rows of one token, and of one block, in one layer's K or V.
        self._token_rows = kv.view(-1, row)
        self._block_rows = kv.view(-1, layout.block_size_tokens * row)
        self._group_tokens = _GATHER_BYTES // (2 * row * kv.element_size())
        self._gathered = torch.empty(0, dtype=kv.dtype, device=spec.device)
        halves = 2 * layout.num_layers
        self._halves: npt.NDArray[np.int64] = np.arange(halves, dtype=np.int64).reshape(-1, 2)

    def plan(self, step: StepShape) -> _SdpaPlan:
        """See `AttentionBackend.plan`."""
        block, offset = np.divmod(step.slots, self._layout.block_size_tokens)
        rows = self._rows(block) * self._layout.block_size_tokens + offset
        groups = [
            self._plan_decodes(step, members)
            for members in group_by_length(step.kv_lengths[: step.num_decodes], self._group_tokens)
        ]
        chunks = []
        start = step.num_decodes
        for i in range(step.num_decodes, len(step.query_lengths)):
            chunks.append(self._plan_chunk(step, i, start))
            start += step.query_lengths[i]
        return _SdpaPlan(self._to_device(rows), groups, chunks)

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
        assert isinstance(plan, _SdpaPlan)
        width = self._token_rows.shape[1]
        self._token_rows.index_copy_(0, plan.new_rows[layer, 0], key.reshape(-1, width))
        self._token_rows.index_copy_(0, plan.new_rows[layer, 1], value.reshape(-1, width))
        if len(plan.groups) == 1 and not plan.chunks:
            return self._attend_decodes(plan.groups[0], layer, query, scale)
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        for group in plan.groups:
            out[group.rows] = self._attend_decodes(group, layer, query[group.rows], scale)
        for chunk in plan.chunks:
            rows = chunk.rows
            out[rows] = self._attend_chunk(chunk, layer, query[rows], key[rows], value[rows], scale)
        return out

    def _attend_decodes(
        self, group: _DecodeGroup, layer: int, query: torch.Tensor, scale: float
    ) -> torch.Tensor:
        kv_heads, head_dim = self._layout.num_kv_heads, self._layout.head_dim
        gathered = self._gather(group.blocks[layer])
        if group.empty is not None:
            gathered.view(-1, kv_heads * head_dim).index_fill_(0, group.empty, 0.0)
        key, value = gathered.view(2, group.size, group.kv_tokens, kv_heads, head_dim).transpose(
            2, 3
        )
        mask = group.mask
        if mask is not None:
            mask = mask.expand(-1, -1, self._heads_per_kv, -1)
        out = F.scaled_dot_product_attention(
            query.reshape(group.size, kv_heads, self._heads_per_kv, head_dim),
            key,
            value,
            attn_mask=mask,
            scale=scale,
        )
        return out.reshape(group.size, self._query_heads, head_dim)

    def _attend_chunk(
        self,
        chunk: _Chunk,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        kv_heads, head_dim = self._layout.num_kv_heads, self._layout.head_dim
        if chunk.blocks is not None:
            gathered = self._gather(chunk.blocks[layer]).view(2, -1, kv_heads, head_dim)
            key, value = gathered[:, : chunk.kv_tokens]
        shape = (kv_heads, self._heads_per_kv, -1, head_dim)
        out = F.scaled_dot_product_attention(
            query.transpose(0, 1).reshape(shape),
            key.transpose(0, 1).unsqueeze(1).expand(shape),
            value.transpose(0, 1).unsqueeze(1).expand(shape),
            attn_mask=chunk.mask,
            is_causal=chunk.mask is None,
            scale=scale,
        )
        return out.reshape(self._query_heads, -1, head_dim).transpose(0, 1)

    def _gather(self, blocks: torch.Tensor) -> torch.Tensor:
        count, width = blocks.shape[0], self._block_rows.shape[1]
        if self._gathered.numel() < count * width:
            self._gathered = self._gathered.new_empty(count * width)
        out = self._gathered[: count * width].view(count, width)
        return torch.index_select(self._block_rows, 0, blocks, out=out)

    def _plan_decodes(self, step: StepShape, members: list[int]) -> _DecodeGroup:
        size = self._layout.block_size_tokens
        lengths = np.array([step.kv_lengths[i] for i in members])
        used = -(-lengths // size)
        width = int(used.max())
        # What pads a table is the sequence's own first block, so that nobody else's is read.
        tables = np.array(
            [
                [*table[:n], *(table[0],) * (width - n)]
                for table, n in zip((step.block_tables[i] for i in members), used, strict=True)
            ],
            dtype=np.int64,
        )
        kv_tokens = width * size
        empty = np.arange(kv_tokens) >= lengths[:, None]
        mask = empty_rows = None
        if empty.any():
            penalty = np.where(empty, np.float32(-np.inf), np.float32(0.0))
            mask = self._to_device(penalty).to(self._layout.dtype)[:, None, None]
            found = np.flatnonzero(empty)
            empty_rows = self._to_device(np.concatenate((found, found + empty.size)))
        everyone = members == list(range(step.num_decodes))
        return _DecodeGroup(
            rows=slice(0, step.num_decodes) if everyone else self._to_device(np.array(members)),
            size=len(members),
            kv_tokens=kv_tokens,
            blocks=self._to_device(self._rows(tables.reshape(-1)).reshape(len(self._halves), -1)),
            empty=empty_rows,
            mask=mask,
        )

    def _plan_chunk(self, step: StepShape, i: int, start: int) -> _Chunk:
        new, total = step.query_lengths[i], step.kv_lengths[i]
        rows = slice(start, start + new)
        if new == total:
            return _Chunk(rows, total, None, None)
        used = -(-total // self._layout.block_size_tokens)
        table = np.array(step.block_tables[i][:used], dtype=np.int64)
        mask = torch.full((new, total), -torch.inf, dtype=self._layout.dtype, device=self._device)
        blocks = self._to_device(self._rows(table).reshape(len(self._halves), -1))
        return _Chunk(rows, total, blocks, mask.triu_(total - new + 1))

    def _to_device(self, array: npt.NDArray[np.generic]) -> torch.Tensor:
        return upload(array, self._device)

    def _rows(self, blocks: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Returns ``[num_layers, 2, n]``: rows of K and V in the pool as rows of one block."""
        found: npt.NDArray[np.int64] = blocks * self._halves.size + self._halves[..., None]
        return found
