"""Which graph a step takes, and what is laid out for it: the parts that need no GPU."""

from __future__ import annotations

from array import array

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from services.worker.engine.attention import AttentionSpec
from services.worker.engine.attention.flashinfer_graph import (
    GraphPart,
    GraphPlanner,
    table_fields,
)
from services.worker.engine.kv_layout import KVLayout
from services.worker.engine.step import SampleRequest, SequenceSlice, StepPlan
from services.worker.engine.step_buffers import StepBuffers
from services.worker.engine.step_graphs import Bucket, choose_bucket, make_buckets
from services.worker.engine.step_input import prepare
from services.worker.messages import SamplingParams

CPU = torch.device("cpu")


@pytest.mark.parametrize("most", [1, 3, 8, 64, 100])
def test_every_batch_of_decodes_has_a_graph(most: int) -> None:
    buckets = make_buckets(most, 4096)
    assert len(set(buckets)) == len(buckets)
    for count in range(1, most + 1):
        bucket = choose_bucket(buckets, count, 0, 0)
        assert bucket is not None
        assert bucket.prompts == 0
        assert count <= bucket.decodes <= max(2 * count, 1)
    assert choose_bucket(buckets, most + 1, 0, 0) is None


@given(st.integers(0, 70), st.integers(0, 12), st.integers(0, 600))
def test_a_step_fits_the_bucket_it_takes(decodes: int, prompts: int, tokens: int) -> None:
    tokens = max(tokens, prompts) if prompts else 0
    bucket = choose_bucket(make_buckets(64, 4096), decodes, prompts, tokens)
    if bucket is None:
        assert decodes + tokens > 512 or decodes > 64 or decodes + prompts > 64
        return
    moved = 0 if bucket.decodes else decodes
    assert decodes - moved <= bucket.decodes
    assert prompts + moved <= bucket.prompts or not prompts + moved
    assert tokens + moved <= bucket.prompt_tokens or not prompts + moved
    # Rows that are gathered are told from rows that are not by their number.
    assert bucket.prompts == 0 or bucket.sequences < bucket.tokens


def test_decodes_beside_a_prompt_keep_their_kernels() -> None:
    buckets = make_buckets(64, 4096)
    assert choose_bucket(buckets, 20, 1, 200) == Bucket(32, 8, 256)
    assert choose_bucket(buckets, 0, 1, 20) == Bucket(0, 1, 32)
    assert choose_bucket(buckets, 0, 8, 256) == Bucket(0, 8, 256)
    assert choose_bucket(buckets, 4, 12, 100) == Bucket(0, 64, 128)


def test_short_contexts_have_few_buckets() -> None:
    assert max(bucket.prompt_tokens for bucket in make_buckets(4, 100)) == 64


def test_buffers_lie_apart_and_are_sent_as_far_as_asked() -> None:
    fields = {"a": (torch.int64, 3), "b": (torch.int32, 5), "c": (torch.int32, 4)}
    buffers = StepBuffers(fields, CPU)
    for number, name in enumerate(fields, start=1):
        buffers.host[name].fill(number)
        assert (buffers.host_tensors[name] == number).all()
    buffers.send(2)
    assert buffers.device["a"].tolist() == [1, 1, 1]
    assert buffers.device["b"].tolist() == [2] * 5
    assert buffers.device["c"].tolist() == [3, 3, 0, 0]
    assert all(
        tensor.data_ptr() % 64 == buffers.device["a"].data_ptr() % 64
        for tensor in buffers.device.values()
    )


def test_tables_of_decodes_and_prompts_share_the_indices() -> None:
    spec = AttentionSpec(KVLayout(1, 16, 2, 64, torch.float16), 2, CPU)
    fields = table_fields(4, 3) | {"indices": (torch.int32, 40)}
    buffers = StepBuffers(fields, CPU)
    planner = GraphPlanner(spec, buffers)
    end = planner.fill(GraphPart(None, "decode", 4, 4), [1, 1], [16, 17], 0)
    assert end == 5
    assert buffers.host["decode_block_ends"].tolist() == [0, 1, 3, 4, 5]
    assert buffers.host["decode_last_lengths"].tolist() == [16, 1, 1, 1]
    end = planner.fill(GraphPart(None, "prompt", 3, 32), [5, 20], [5, 52], end)
    assert end == 11
    assert buffers.host["query_ends"].tolist() == [0, 5, 25, 25]
    assert buffers.host["prompt_block_ends"].tolist() == [5, 6, 10, 11]
    assert buffers.host["prompt_last_lengths"].tolist() == [5, 4, 1]


def test_a_plan_is_laid_out_flat() -> None:
    wanted = SampleRequest(SamplingParams(), 1)
    plan = StepPlan(
        (
            SequenceSlice([7], 9, array("i", [3, 5, 1]), wanted),
            SequenceSlice([8], 0, array("i", [2]), None),
            SequenceSlice([0], 3, array("i", [5]), wanted, follows=4),
            SequenceSlice([1, 2, 3, 4], 2, array("i", [6, 4]), wanted),
        )
    )
    step = prepare(plan, 4, {1: 0, 4: 1})
    assert step.token_ids.tolist() == [7, 8, 0, 1, 2, 3, 4]
    assert step.follows.tolist() == [-1, -1, 1, -1, -1, -1, -1]
    assert step.positions.tolist() == [9, 0, 3, 2, 3, 4, 5]
    assert step.shape.slots.tolist() == [1 * 4 + 1, 8, 23, 26, 27, 16, 17]
    assert step.rows.tolist() == [0, 2, 6]
    assert step.sampled == {0: 0, 2: 1, 3: 2}
    assert step.shape.num_decodes == 3
    assert step.shape.kv_lengths == [10, 1, 4, 6]
    assert step.rows.dtype == np.int64
