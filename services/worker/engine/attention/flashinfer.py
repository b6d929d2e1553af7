"""Attention by FlashInfer over the paged pool: half precision on a GPU.

Decodes take its decode kernels and everything else its prefill kernels, planned once per step. A
step that is captured in a CUDA graph has wrappers of its own (`graph_part`), whose buffers every
later step of the same size refills.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from services.common.errors import ConfigError
from services.worker.engine.attention.base import AttentionSpec, Plan, RotaryInput, StepShape
from services.worker.engine.attention.flashinfer_graph import GraphPart, GraphPlanner
from services.worker.engine.step_buffers import StepBuffers

_DTYPES = frozenset({torch.bfloat16, torch.float16})
_HEAD_DIMS = frozenset({64, 128, 256})
_WORKSPACE_BYTES = 512 << 20
# FlashAttention 3 takes a minute to build and is ahead of 2, on Hopper, where attention is most
# of the work: for this many new tokens or more, of a sequence longer than this.
_LONG_NEW = 128
_LONG_KV = 4096
_HOPPER = 9


def why_not(spec: AttentionSpec) -> str | None:
    """Returns why FlashInfer cannot serve a model here; None if it can."""
    layout = spec.layout
    if spec.device.type != "cuda":
        return "needs a CUDA device"
    if layout.dtype not in _DTYPES:
        return f"needs bfloat16 or float16, and not {str(layout.dtype).removeprefix('torch.')}"
    if layout.head_dim not in _HEAD_DIMS:
        return f"has no kernels for heads of {layout.head_dim} elements"
    if importlib.util.find_spec("flashinfer") is None:
        return "is not installed (extra: cuda)"
    try:
        importlib.import_module("flashinfer")
    except ImportError as error:
        return f"does not import: {error}"
    return None


@dataclass(frozen=True, slots=True)
class FlashInferPlan:
    """A planned step.

    Attributes:
        slots: int64 ``[T]``, where each token's K and V go; negative: nowhere.
        num_decodes: This many tokens, the first ones, are `decode`'s.
        decode: FlashInfer's wrapper for decodes; None if there are none.
        prefill: The one for all other tokens; None if there are none.
    """

    slots: torch.Tensor
    num_decodes: int
    decode: Any
    prefill: Any


@dataclass(frozen=True, slots=True)
class _Tables:
    """Sequences as FlashInfer wants them: pinned host memory, but for the indices.

    Attributes:
        query_ends: int32 ``[n + 1]``, running sum of new tokens from 0.
        block_ends: int32 ``[n + 1]``, running sum of used blocks from 0.
        last_lengths: int32 ``[n]``, tokens in each last block.
        kv_lengths: int32 ``[n]``.
        longest: Most new tokens of a sequence.
    """

    query_ends: torch.Tensor
    block_ends: torch.Tensor
    last_lengths: torch.Tensor
    kv_lengths: torch.Tensor
    longest: int


class FlashInferBackend:
    """See the module."""

    name = "flashinfer"

    def __init__(self, spec: AttentionSpec, kv: torch.Tensor) -> None:
        """Binds the backend to a pool.

        Args:
            spec: What stays the same for all steps.
            kv: The device pool as `KVLayout.view` shows it.

        Raises:
            ConfigError: FlashInfer cannot serve this model here.
        """
        reason = why_not(spec)
        if reason is not None:
            raise ConfigError(f"--attention flashinfer: {reason}")
        import flashinfer  # type: ignore[import-not-found, import-untyped, unused-ignore]

        from services.worker.engine.models import kv_write

        self._flashinfer = flashinfer
        self._kv_write = kv_write
        self._spec = spec
        self._layout = spec.layout
        self._device = spec.device
        self._query_heads = spec.num_query_heads
        self._layers = [kv[:, layer] for layer in range(spec.layout.num_layers)]
        self._workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=spec.device)
        generation = torch.cuda.get_device_capability(spec.device)[0]
        self._early = generation >= _HOPPER
        hopper = generation == _HOPPER
        self._decode = self._decode_wrapper()
        self._short = self._prefill_wrapper("fa2")
        self._long = self._prefill_wrapper("fa3") if hopper else self._short
        # Reached once the last plan's host buffers have been read.
        self._read = torch.cuda.Event()

    def build(self, max_context_length: int) -> None:
        """Builds the kernels, or loads those that were built before: a minute or two at most.

        Args:
            max_context_length: Most tokens of a sequence.

        Raises:
            ConfigError: They cannot be built.
        """
        layout, length = self._layout, _LONG_NEW + _LONG_KV
        shape = (_LONG_NEW, self._query_heads, layout.head_dim)
        query = torch.zeros(shape, dtype=layout.dtype, device=self._device)
        long = self._long is not self._short and max_context_length > _LONG_KV
        for new, total in ((1, 1), (2, 2), *(((_LONG_NEW, length),) if long else ())):
            table = [0] * -(-total // layout.block_size_tokens)
            slots = np.full(new, -1, dtype=np.int64)
            try:
                plan = self.plan(StepShape([new], [total], [table], int(new == 1), slots))
            except RuntimeError as error:
                reason = (str(error).strip().splitlines() or [repr(error)])[0]
                raise ConfigError(
                    f"--attention {self.name}: its kernels cannot be built here ({reason});"
                    " --attention sdpa needs none"
                ) from error
            self._attend(plan, 0, query[:new], 1.0)

    # --- plans -----------------------------------------------------------------------------------

    def plan(self, step: StepShape) -> FlashInferPlan:
        """See `AttentionBackend.plan`."""
        self.begin_plan()
        count = step.num_decodes
        decode = prefill = None
        if count:
            decode = self._decode
            self._plan_part(decode, step, slice(0, count), decodes=True)
        if count < len(step.query_lengths):
            new, total = max(step.query_lengths[count:]), max(step.kv_lengths[count:])
            prefill = self._long if new >= _LONG_NEW and total > _LONG_KV else self._short
            self._plan_part(prefill, step, slice(count, None), decodes=False)
        slots = _pinned(step.slots).to(self._device, non_blocking=True)
        self.end_plan()
        return FlashInferPlan(slots, count, decode, prefill)

    def graph_planner(self, buffers: StepBuffers) -> GraphPlanner:
        """Returns what plans captured steps, whose tables are in `buffers`."""
        return GraphPlanner(self._spec, buffers)

    def graph_part(
        self, planner: GraphPlanner, kind: str, sequences: int, tokens: int
    ) -> GraphPart:
        """Returns a part of a captured step.

        Args:
            planner: Of the step's buffers.
            kind: ``decode`` or ``prompt``.
            sequences: Most sequences, padding included.
            tokens: Most tokens of all of them.
        """
        tables = (
            planner.device(f"{kind}_block_ends", sequences + 1),
            planner.device("indices", planner.most_indices),
            planner.device(f"{kind}_last_lengths", sequences),
        )
        if kind == "decode":
            names = ("indptr_buffer", "indices_buffer", "last_page_len_buffer")
            own, make = self._decode, self._decode_wrapper
            extra = {}
        else:
            names = ("indptr_buf", "indices_buf", "last_page_len_buf")
            own, make = self._short, partial(self._prefill_wrapper, "fa2")
            extra = {"qo_indptr_buf": planner.device("query_ends", sequences + 1)}
        buffers = {f"paged_kv_{name}": table for name, table in zip(names, tables, strict=True)}
        wrapper = make(use_cuda_graph=True, **buffers, **extra)
        # Steps run one after another and plan anew each time, so that one set of buffers will do.
        wrapper._int_workspace_buffer = own._int_workspace_buffer
        wrapper._pin_memory_int_workspace_buffer = own._pin_memory_int_workspace_buffer
        return GraphPart(wrapper, kind, sequences, tokens)

    def begin_plan(self) -> None:
        """Waits until the host buffers of the last plan have been read, which they mostly have."""
        self._read.synchronize()

    def end_plan(self) -> None:
        """Marks where the copies of a plan's host buffers are in the stream."""
        self._read.record()

    def _tables(self, query_lengths: list[int], kv_lengths: list[int]) -> _Tables:
        """Returns sequences as FlashInfer wants them."""
        count = len(kv_lengths)
        size = self._layout.block_size_tokens
        host = torch.empty(4 * count + 2, dtype=torch.int32, pin_memory=True)
        values = host.numpy()
        lengths = np.array(kv_lengths, dtype=np.int32)
        blocks = (lengths + (size - 1)) // size
        query_ends, block_ends = values[: count + 1], values[count + 1 : 2 * count + 2]
        query_ends[0] = block_ends[0] = 0
        np.cumsum(query_lengths, out=query_ends[1:])
        np.cumsum(blocks, out=block_ends[1:])
        values[2 * count + 2 : 3 * count + 2] = lengths - (blocks - 1) * size
        values[3 * count + 2 :] = lengths
        ends, used_ends, last, kv = host.split((count + 1, count + 1, count, count))
        return _Tables(ends, used_ends, last, kv, longest=max(query_lengths))

    def _plan_wrapper(
        self, wrapper: Any, tables: _Tables, indices: torch.Tensor, *, decodes: bool
    ) -> None:
        """Plans for one of FlashInfer's wrappers; waits for nothing."""
        layout = self._layout
        heads = (self._query_heads, layout.num_kv_heads, layout.head_dim, layout.block_size_tokens)
        types = {"q_data_type": layout.dtype, "kv_data_type": layout.dtype}
        if decodes:
            wrapper.plan(
                tables.block_ends,
                indices,
                tables.last_lengths,
                *heads,
                seq_lens=tables.kv_lengths,
                **types,
            )
        else:
            wrapper.plan(
                tables.query_ends,
                tables.block_ends,
                indices,
                tables.last_lengths,
                *heads,
                causal=True,
                seq_lens=tables.kv_lengths,
                max_token_per_sequence=tables.longest,
                **types,
            )

    def flat_indices(self, step: StepShape, part: slice) -> npt.NDArray[np.int32]:
        """Returns the used block ids of some of a step's sequences, one after another."""
        size = self._layout.block_size_tokens
        used = [-(-length // size) for length in step.kv_lengths[part]]
        return np.concatenate(
            [
                np.asarray(table, dtype=np.int32)[:count]
                for table, count in zip(step.block_tables[part], used, strict=True)
            ]
        )

    def _plan_part(self, wrapper: Any, step: StepShape, part: slice, *, decodes: bool) -> None:
        tables = self._tables(step.query_lengths[part], step.kv_lengths[part])
        indices = _pinned(self.flat_indices(step, part)).to(self._device, non_blocking=True)
        self._plan_wrapper(wrapper, tables, indices, decodes=decodes)

    def _decode_wrapper(self, **settings: object) -> Any:
        # The kernels without tensor cores are made for one query head per KV head.
        grouped = self._query_heads != self._layout.num_kv_heads
        return self._flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            self._workspace, "NHD", use_tensor_cores=grouped, **settings
        )

    def _prefill_wrapper(self, kernels: str, **settings: object) -> Any:
        return self._flashinfer.BatchPrefillWithPagedKVCacheWrapper(
            self._workspace, "NHD", backend=kernels, **settings
        )

    # --- layers ----------------------------------------------------------------------------------

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
        assert isinstance(plan, FlashInferPlan)
        self._kv_write.write(key, value, plan.slots, self._layers[layer])
        return self._attend(plan, layer, query.contiguous(), scale)

    def attend_rotary(
        self, plan: Plan, layer: int, source: RotaryInput, scale: float
    ) -> torch.Tensor:
        """See `RotaryBackend.attend_rotary`."""
        assert isinstance(plan, FlashInferPlan)
        query = torch.empty(
            (len(source.qkv), self._query_heads, self._layout.head_dim),
            dtype=source.qkv.dtype,
            device=source.qkv.device,
        )
        self._kv_write.rotate_and_write(
            source, plan.slots, self._layers[layer], query, early=self._early
        )
        return self._attend(plan, layer, query, scale)

    def _attend(
        self, plan: FlashInferPlan, layer: int, query: torch.Tensor, scale: float
    ) -> torch.Tensor:
        out = torch.empty_like(query)
        count = plan.num_decodes
        pool = self._layers[layer]
        for wrapper, rows in (
            (plan.decode, slice(0, count)),
            (plan.prefill, slice(count, None)),
        ):
            if wrapper is not None:
                # Known per layer here, and to be given to `plan` there.
                wrapper._sm_scale = scale
                wrapper.run(query[rows], pool, out=out[rows])
        return out


def _pinned(array: npt.NDArray[np.generic]) -> torch.Tensor:
    return torch.from_numpy(array).pin_memory()
