"""Steps captured in CUDA graphs: decodes by batch, short prompts by tokens, and both at once.

Without a graph a step costs more Python than GPU time. A graph is captured for each of a few
sizes at start; a step takes the smallest that it fits and pads itself to its size. Padding tokens
write no K and V, and what is computed for them nobody reads.

All graphs read one set of input buffers, which one copy from pinned memory fills, and share one
pool of memory for what lies in between, as no two of them run at once. The tokens that a step
samples stay where the next one finds those that it follows.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from services.worker.engine.attention.flashinfer import FlashInferBackend, FlashInferPlan
from services.worker.engine.attention.flashinfer_graph import GraphPart, table_fields
from services.worker.engine.models.base import StepModel
from services.worker.engine.sampler import follow
from services.worker.engine.step_buffers import StepBuffers
from services.worker.engine.step_input import HostStep

_DECODES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 256)
_PROMPT_TOKENS = (32, 64, 128, 192, 256, 384, 512)
_FEW_PROMPTS = 8
_MIXED_DECODES = (8, 32)
_MIXED_TOKENS = (64, 128, 256, 512)
# A decode among prompts goes through kernels made for prompts, as if it had this many tokens.
_DECODE_AS_PROMPT = 4

Report = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class Bucket:
    """A size that a graph is captured for.

    Attributes:
        decodes: Most sequences of one new token.
        prompts: Most other sequences.
        prompt_tokens: Most new tokens of those.
    """

    decodes: int
    prompts: int
    prompt_tokens: int

    @property
    def tokens(self) -> int:
        """Tokens of a step of this size."""
        return self.decodes + self.prompt_tokens

    @property
    def sequences(self) -> int:
        """Sequences of a step of this size."""
        return self.decodes + self.prompts


def make_buckets(max_sequences: int, max_context_length: int) -> list[Bucket]:
    """Returns the sizes to capture.

    Args:
        max_sequences: Most sequences of a step.
        max_context_length: Most tokens of a sequence.
    """
    few = min(_FEW_PROMPTS, max_sequences)
    made = [
        Bucket(size, 0, 0)
        for size in sorted({min(size, max_sequences) for size in (*_DECODES, max_sequences)})
    ]
    for prompts in sorted({1, few, max_sequences}):
        made += [
            Bucket(0, prompts, tokens)
            for tokens in _PROMPT_TOKENS
            if prompts < tokens <= max_context_length
        ]
    for decodes in sorted({min(size, max_sequences) for size in (*_MIXED_DECODES, max_sequences)}):
        made += [
            Bucket(decodes, few, tokens) for tokens in _MIXED_TOKENS if tokens <= max_context_length
        ]
    return made


def choose_bucket(
    buckets: Sequence[Bucket], decodes: int, prompts: int, prompt_tokens: int
) -> Bucket | None:
    """Returns the cheapest bucket that a step fits; None if there is none.

    Args:
        buckets: To choose from.
        decodes: Sequences of one new token.
        prompts: Other sequences.
        prompt_tokens: New tokens of these.
    """
    best: Bucket | None = None
    least = 0
    for bucket in buckets:
        if not prompts and bucket.prompts:
            continue
        # Where there is no place for decodes, they go as prompts.
        moved = 0 if bucket.decodes else decodes
        fits = (
            bucket.decodes >= decodes - moved
            and bucket.prompts >= prompts + moved
            and bucket.prompt_tokens >= prompt_tokens + moved
        )
        cost = bucket.tokens + bucket.sequences + _DECODE_AS_PROMPT * moved
        if fits and (best is None or cost < least):
            best, least = bucket, cost
    return best


@dataclass(frozen=True, slots=True)
class GraphOutput:
    """What a replayed step made, on the device until the next step.

    Attributes:
        logits: float32 ``[n, vocab_size]``.
        likeliest: int64 ``[n]``, the likeliest tokens, -1 where logits are not numbers.
        in_place: `likeliest` is the beginning of the tokens that the next step may follow.
    """

    logits: torch.Tensor
    likeliest: torch.Tensor
    in_place: bool


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    decode: GraphPart | None
    prompt: GraphPart | None


class StepGraphs:
    """Captures and replays; all calls come from the compute stream's context."""

    def __init__(
        self,
        model: StepModel,
        attention: FlashInferBackend,
        sampled: torch.Tensor,
        *,
        vocab_size: int,
        max_sequences: int,
        max_context_length: int,
        block_size: int,
        device: torch.device,
    ) -> None:
        """Allocates the buffers.

        Args:
            model: The forward pass.
            attention: Its backend.
            sampled: Where a step's tokens stay for the next one; see `follow`.
            vocab_size: Logits per token.
            max_sequences: Most sequences of a step.
            max_context_length: Most tokens of a sequence.
            block_size: Tokens per block.
            device: Where.
        """
        self._model = model
        self._attention = attention
        self._sampled = sampled
        self._device = device
        self._buckets = make_buckets(max_sequences, max_context_length)
        tokens = max(bucket.tokens for bucket in self._buckets)
        sequences = max(bucket.sequences for bucket in self._buckets)
        decodes = max(bucket.decodes for bucket in self._buckets)
        prompts = max(bucket.prompts for bucket in self._buckets)
        most_indices = sequences * -(-max_context_length // block_size)
        self._buffers = StepBuffers(
            {
                "token_ids": (torch.int64, tokens),
                "follows": (torch.int64, tokens),
                "positions": (torch.int64, tokens),
                "slots": (torch.int64, tokens),
                "rows": (torch.int64, sequences),
                **table_fields(decodes, prompts),
                "indices": (torch.int32, most_indices),
            },
            device,
        )
        self._planner = attention.graph_planner(self._buffers)
        self._logits = torch.zeros(sequences, vocab_size, dtype=torch.float32, device=device)
        assert sequences < len(sampled)
        self._graphs: dict[Bucket, _Captured] = {}
        self._choose = functools.lru_cache(4096)(functools.partial(choose_bucket, self._buckets))

    def capture(self, report: Report) -> None:
        """Captures all graphs; reads and writes no block's KV that anybody has.

        Args:
            report: Told what is being done and the fraction done.
        """
        pool: Any = torch.cuda.graph_pool_handle()
        gc.collect()
        order = sorted(self._buckets, key=lambda bucket: -bucket.tokens)
        for done, bucket in enumerate(order):
            report("capturing CUDA graphs", done / len(order))
            self._capture(bucket, pool)
        report("capturing CUDA graphs", 1.0)

    def run(self, step: HostStep, begin: Callable[[], None]) -> GraphOutput | None:
        """Queues a step.

        Args:
            step: Its inputs.
            begin: Called just before the model's work is queued.

        Returns:
            None, having queued nothing, if no graph fits it.
        """
        shape, tokens = step.shape, len(step.token_ids)
        decodes, sequences = shape.num_decodes, len(shape.query_lengths)
        bucket = self._choose(decodes, sequences - decodes, tokens - decodes)
        if bucket is None:
            return None
        if not bucket.decodes:
            decodes = 0
        indices = [
            np.asarray(table, dtype=np.int32)[: -(-length // self._planner.block_size)]
            for table, length in zip(shape.block_tables, shape.kv_lengths, strict=True)
        ]
        if sum(map(len, indices)) + bucket.sequences > self._planner.most_indices:
            return None
        captured = self._graphs[bucket]
        self._attention.begin_plan()
        self._lay_out(bucket, step, decodes)
        end = 0
        host = self._buffers.host["indices"]
        for part, span in (
            (captured.decode, slice(0, decodes)),
            (captured.prompt, slice(decodes, None)),
        ):
            if part is None:
                continue
            used = indices[span]
            count = sum(map(len, used))
            if used:
                np.concatenate(used, out=host[end : end + count])
            start, end = (
                end,
                self._planner.fill(part, shape.query_lengths[span], shape.kv_lengths[span], end),
            )
            host[start + count : end] = 0
        self._buffers.send(end)
        for part in (captured.decode, captured.prompt):
            if part is not None:
                self._planner.plan(part)
        self._attention.end_plan()
        begin()
        captured.graph.replay()
        count = len(step.rows)
        if not bucket.prompts and count < tokens:
            # Rare: a decode that nothing is sampled after.
            wanted = torch.from_numpy(step.rows).pin_memory().to(self._device, non_blocking=True)
            return GraphOutput(self._logits[wanted], self._sampled[wanted], in_place=False)
        return GraphOutput(self._logits[:count], self._sampled[:count], in_place=True)

    def _lay_out(self, bucket: Bucket, step: HostStep, decodes: int) -> None:
        """Writes a step's tokens: decodes first, then what pads them, then prompts."""
        host, prompts = self._buffers.host, len(step.token_ids) - decodes
        gap = bucket.decodes - decodes
        for name, value, padding in (
            ("token_ids", step.token_ids, 0),
            ("follows", step.follows, -1),
            ("positions", step.positions, 0),
            ("slots", step.shape.slots, -1),
        ):
            row = host[name]
            row[:decodes] = value[:decodes]
            row[decodes : bucket.decodes] = padding
            row[bucket.decodes : bucket.decodes + prompts] = value[decodes:]
            row[bucket.decodes + prompts : bucket.tokens] = padding
        rows = host["rows"]
        count = len(step.rows)
        rows[:count] = step.rows
        if gap:
            rows[:count] += gap * (step.rows >= decodes)
        rows[count : bucket.sequences] = 0

    def _capture(self, bucket: Bucket, pool: Any) -> None:
        planner, buffers = self._planner, self._buffers
        make = functools.partial(self._attention.graph_part, planner)
        decode = prompt = None
        if bucket.decodes:
            decode = make("decode", bucket.decodes, bucket.decodes)
        if bucket.prompts:
            prompt = make("prompt", bucket.prompts, bucket.prompt_tokens)
        self._attention.begin_plan()
        for name in ("token_ids", "positions", "indices"):
            buffers.host[name].fill(0)
        for name in ("follows", "slots"):
            buffers.host[name].fill(-1)
        buffers.host["rows"][:] = np.arange(len(buffers.host["rows"])) % bucket.tokens
        for part in (decode, prompt):
            if part is not None:
                # The first plan fixes the most tokens: one sequence takes what the others leave.
                lengths = [1] * part.sequences
                lengths[-1] += part.tokens - part.sequences
                planner.fill(part, lengths, lengths, 0)
        buffers.send(planner.most_indices)
        for part in (decode, prompt):
            if part is not None:
                planner.first_plan(part)
        self._attention.end_plan()
        plan = FlashInferPlan(
            buffers.device["slots"][: bucket.tokens],
            bucket.decodes,
            decode.wrapper if decode is not None else None,
            prompt.wrapper if prompt is not None else None,
        )
        self._forward(bucket, plan)
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        self._forward(bucket, plan)
        graph.capture_end()
        self._graphs[bucket] = _Captured(graph, decode, prompt)

    def _forward(self, bucket: Bucket, plan: FlashInferPlan) -> None:
        device = self._buffers.device
        logits = self._model.forward(
            follow(
                device["token_ids"][: bucket.tokens],
                device["follows"][: bucket.tokens],
                self._sampled,
            ),
            device["positions"][: bucket.tokens],
            device["rows"][: bucket.sequences],
            self._attention,
            plan,
        )
        out = self._logits[: bucket.sequences]
        out.copy_(logits)
        values, likeliest = out.max(dim=-1)
        self._sampled[: bucket.sequences] = likeliest.masked_fill(values.isnan(), -1)
