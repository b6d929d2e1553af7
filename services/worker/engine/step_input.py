"""Lays a step's plan out as flat rows in host memory; no device work."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.worker.engine.attention import StepShape
from services.worker.engine.step import SampleRequest, SequenceSlice, StepPlan


@dataclass(frozen=True, slots=True)
class HostStep:
    """A step's inputs in host memory.

    Attributes:
        shape: What attention needs to know.
        token_ids: int64 ``[T]``; 0 where `follows` has a row.
        follows: int64 ``[T]``, the row that holds the token among those that the step before
            samples; -1: the token is in `token_ids`.
        positions: int64 ``[T]``.
        rows: int64 ``[n]``, the last token of each slice to be sampled after, ascending.
        requests: How to sample, for each of `rows`.
        sampled: Place in `rows` of each slice that is sampled after.
    """

    shape: StepShape
    token_ids: npt.NDArray[np.int64]
    follows: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    requests: list[SampleRequest]
    sampled: dict[int, int]


def prepare(plan: StepPlan, block_size: int, sampled_before: Mapping[int, int]) -> HostStep:
    """Returns a plan's inputs.

    Args:
        plan: At least one slice.
        block_size: Tokens per block.
        sampled_before: `HostStep.sampled` of the step launched just before.
    """
    slices = plan.slices
    query_lengths = [len(part.token_ids) for part in slices]
    num_decodes = sum(1 for _ in itertools.takewhile(lambda n: n == 1, query_lengths))
    decodes, rest = slices[:num_decodes], slices[num_decodes:]
    # Decodes are many and small: plain lists are faster than an array for each.
    token_ids = [0 if part.follows is not None else part.token_ids[0] for part in decodes]
    positions = [part.start for part in decodes]
    slots = [
        part.block_table[part.start // block_size] * block_size + part.start % block_size
        for part in decodes
    ]
    flat = [np.array(values, dtype=np.int64) for values in (token_ids, positions, slots)]
    if rest:
        laid = [_lay_out(part, block_size) for part in rest]
        flat = [
            np.concatenate((first, *more))
            for first, more in zip(flat, zip(*laid, strict=True), strict=True)
        ]
    follows = np.full(len(flat[0]), -1, dtype=np.int64)
    follows[:num_decodes] = [
        -1 if part.follows is None else sampled_before[part.follows] for part in decodes
    ]
    ends = np.cumsum(query_lengths) - 1
    wanted = [i for i, part in enumerate(slices) if part.sample is not None]
    return HostStep(
        shape=StepShape(
            query_lengths=query_lengths,
            kv_lengths=[part.start + n for part, n in zip(slices, query_lengths, strict=True)],
            block_tables=[part.block_table for part in slices],
            num_decodes=num_decodes,
            slots=flat[2],
        ),
        token_ids=flat[0],
        follows=follows,
        positions=flat[1],
        rows=ends[wanted].astype(np.int64),
        requests=[part.sample for part in slices if part.sample is not None],
        sampled={index: row for row, index in enumerate(wanted)},
    )


def _lay_out(part: SequenceSlice, block_size: int) -> tuple[npt.NDArray[np.int64], ...]:
    """Returns a slice's token ids, positions and slots."""
    count = len(part.token_ids)
    positions = np.arange(part.start, part.start + count, dtype=np.int64)
    table = np.asarray(part.block_table, dtype=np.int64)
    slots = table[positions // block_size] * block_size + positions % block_size
    return np.array(part.token_ids, dtype=np.int64), positions, slots
