"""FlashInfer's part of a step that is captured in a CUDA graph.

The wrappers read their tables from `StepBuffers`, which every step refills. FlashInfer's own
`plan` would copy those tables once more and look into them element by element, which takes longer
than a small step may wait: after the first time only the planning itself is called.

Planning ends with a copy of its result to the device by a copy engine, which would make the step
wait for all KV that is on its way there. So that copy goes to a place where nobody looks, beside
the step's stream, and a kernel brings the result (see `bus_copies`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from services.worker.engine.attention.base import AttentionSpec
from services.worker.engine.step_buffers import StepBuffers

_NO_WINDOW = -1
_NO_SPLIT_SIZE = -1
_WORD = torch.int32

# Of FlashInfer's `DecodePlanInfo` and `PrefillPlanInfo` as vectors: where the counts of tiles (and
# of rows) stand, and the offsets of arrays of at most one int32 more than these counts.
_PLAN_COUNTS = {10: (0,), 15: (0, 1)}
_PLAN_OFFSETS = {10: (3, 4, 5, 6, 7), 15: (2, 4, 5, 6, 7, 8, 9, 12)}


def table_fields(decodes: int, prompts: int) -> dict[str, tuple[torch.dtype, int]]:
    """Returns the buffers that graphs need for their tables.

    Args:
        decodes: Most sequences of one new token.
        prompts: Most other sequences.
    """
    fields = {"query_ends": (torch.int32, prompts + 1)}
    for kind, count in (("prompt", prompts), ("decode", decodes)):
        fields[f"{kind}_block_ends"] = (torch.int32, count + 1)
        fields[f"{kind}_last_lengths"] = (torch.int32, count)
        fields[f"{kind}_lengths"] = (torch.int32, count)
    return fields


@dataclass(frozen=True, slots=True)
class GraphPart:
    """The decodes or the prompts of a captured step.

    Attributes:
        wrapper: FlashInfer's, made for CUDA graphs.
        kind: ``decode`` or ``prompt``.
        sequences: Most sequences.
        tokens: Most tokens of all of them.
    """

    wrapper: Any
    kind: str
    sequences: int
    tokens: int


def plan_bytes(info: Sequence[int]) -> int:
    """Returns how many bytes of the workspace for integers a plan takes, or a few more.

    Args:
        info: FlashInfer's plan as a vector: of decodes it has 10 elements, of prompts 15.
    """
    most = 1 + max(info[place] for place in _PLAN_COUNTS[len(info)])
    return max(info[place] for place in _PLAN_OFFSETS[len(info)]) + most * _WORD.itemsize


class GraphPlanner:
    """Fills tables and plans.

    Args:
        spec: What stays the same for all steps.
        buffers: With `table_fields` and ``indices``.

    Attributes:
        block_size: Tokens per block.
        most_indices: Most block ids of a step, padding included.
    """

    def __init__(self, spec: AttentionSpec, buffers: StepBuffers) -> None:
        self._spec = spec
        self._buffers = buffers
        self.most_indices = len(buffers.host["indices"])
        self.block_size = spec.layout.block_size_tokens
        self._empty = torch.empty(0, dtype=spec.layout.dtype)
        self._no_indices = torch.empty(0, dtype=torch.int32, device=spec.device)
        self._aside: tuple[torch.cuda.Stream, torch.Tensor] | None = None

    def device(self, name: str, count: int) -> torch.Tensor:
        """Returns the first elements of a buffer on the device."""
        return self._buffers.device[name][:count]

    def fill(
        self,
        part: GraphPart,
        query_lengths: Sequence[int],
        kv_lengths: Sequence[int],
        first_index: int,
    ) -> int:
        """Writes a part's tables; what pads it has one token of KV.

        Args:
            part: Which.
            query_lengths: New tokens of each sequence.
            kv_lengths: Tokens of each sequence after the step.
            first_index: Where the part's block ids start among the indices.

        Returns:
            Where they end, padding included.
        """
        host, kind, count = self._buffers.host, part.kind, len(kv_lengths)
        lengths = host[f"{kind}_lengths"][: part.sequences]
        lengths[:count] = kv_lengths
        lengths[count:] = 1
        blocks = (lengths + (self.block_size - 1)) // self.block_size
        ends = host[f"{kind}_block_ends"][: part.sequences + 1]
        ends[0] = first_index
        np.cumsum(blocks, out=ends[1:])
        ends[1:] += first_index
        np.subtract(
            lengths,
            (blocks - 1) * self.block_size,
            out=host[f"{kind}_last_lengths"][: part.sequences],
        )
        if kind == "prompt":
            queries = host["query_ends"][: part.sequences + 1]
            queries[0] = 0
            np.cumsum(query_lengths, out=queries[1 : count + 1])
            queries[count + 1 :] = queries[count]
        return int(ends[-1])

    def first_plan(self, part: GraphPart) -> None:
        """Plans by FlashInfer's own `plan`; the tables are those that `fill` wrote."""
        layout = self._spec.layout
        heads = (
            self._spec.num_query_heads,
            layout.num_kv_heads,
            layout.head_dim,
            layout.block_size_tokens,
        )
        types = {"q_data_type": layout.dtype, "kv_data_type": layout.dtype}
        host = self._host(part)
        if part.kind == "decode":
            part.wrapper.plan(
                host("block_ends", 1),
                self._no_indices,
                host("last_lengths", 0),
                *heads,
                seq_lens=host("lengths", 0),
                **types,
            )
        else:
            part.wrapper.plan(
                self._buffers.host_tensors["query_ends"][: part.sequences + 1],
                host("block_ends", 1),
                self._no_indices,
                host("last_lengths", 0),
                *heads,
                causal=True,
                seq_lens=host("lengths", 0),
                max_token_per_sequence=part.tokens,
                **types,
            )

    def plan(self, part: GraphPart) -> None:
        """Plans anew; the tables are those that `fill` wrote."""
        from services.worker.engine import bus_copies

        layout, wrapper = self._spec.layout, part.wrapper
        host = self._host(part)
        result, target = wrapper._pin_memory_int_workspace_buffer, wrapper._int_workspace_buffer
        if self._aside is None:
            self._aside = torch.cuda.Stream(self._spec.device), torch.empty_like(target)
        stream, unread = self._aside
        shared = (wrapper._float_workspace_buffer, unread, result)
        heads = (self._spec.num_query_heads, layout.num_kv_heads, layout.block_size_tokens, True)
        dims = (layout.head_dim, layout.head_dim)
        if part.kind == "decode" and not wrapper.use_tensor_cores:
            arguments: tuple[Any, ...] = (
                host("block_ends", 1),
                part.sequences,
                *heads,
                _NO_WINDOW,
                0.0,
                *dims,
                self._empty,
                self._empty,
            )
        else:
            decode = part.kind == "decode"
            arguments = (
                self._decode_queries(part.sequences)
                if decode
                else self._buffers.host_tensors["query_ends"][: part.sequences + 1],
                host("block_ends", 1),
                host("lengths", 0),
                part.tokens,
                part.sequences,
                *heads,
                *dims,
                not decode,
                _NO_WINDOW,
                _NO_SPLIT_SIZE,
                False,
                0,
            )
        with torch.cuda.stream(stream):
            wrapper._plan_info = wrapper._cached_module.plan(*shared, *arguments)
        words = slice(0, plan_bytes(list(wrapper._plan_info)) // _WORD.itemsize)
        bus_copies.copy(result.view(_WORD)[words], target.view(_WORD)[words])

    def _host(self, part: GraphPart) -> Callable[[str, int], torch.Tensor]:
        def get(name: str, more: int) -> torch.Tensor:
            return self._buffers.host_tensors[f"{part.kind}_{name}"][: part.sequences + more]

        return get

    def _decode_queries(self, sequences: int) -> torch.Tensor:
        return torch.arange(sequences + 1, dtype=torch.int32)
