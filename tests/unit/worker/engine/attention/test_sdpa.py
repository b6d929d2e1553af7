"""The sdpa backend against attention written out in float64."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.engine.attention import AttentionSpec, StepShape
from services.worker.engine.attention.sdpa import SdpaBackend, group_by_length
from services.worker.engine.kv_layout import KVLayout
from tests.support.model_driver import nan_pool

LAYERS = 2
HEAD_DIM = 8
SCALE = 0.3
NUM_BLOCKS = 80


class Sequence:
    """One sequence's whole K, V and Q, all layers, and its blocks."""

    def __init__(self, length: int, heads: int, kv_heads: int, table: list[int]) -> None:
        self.query = torch.randn(LAYERS, length, heads, HEAD_DIM)
        self.key = torch.randn(LAYERS, length, kv_heads, HEAD_DIM)
        self.value = torch.randn(LAYERS, length, kv_heads, HEAD_DIM)
        self.table = table

    def expected(self, layer: int, start: int) -> torch.Tensor:
        """Attention of the tokens from `start` on."""
        query = self.query[layer].double()
        group = query.shape[1] // self.key.shape[2]
        key = self.key[layer].double().repeat_interleave(group, dim=1)
        value = self.value[layer].double().repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", query, key) * SCALE
        seen = torch.ones(scores.shape[-2:]).tril().bool()
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, value)[start:].float()


def attend(
    sequences: list[Sequence], news: list[int], heads: int, kv_heads: int, block_size: int
) -> None:
    """Writes all but the last `news` tokens by hand, the rest in one step, and compares."""
    layout = KVLayout(LAYERS, block_size, kv_heads, HEAD_DIM, torch.float32)
    kv = layout.view(nan_pool(layout, NUM_BLOCKS))
    backend = SdpaBackend(AttentionSpec(layout, heads, torch.device("cpu")), kv)
    slots = []
    for sequence, new in zip(sequences, news, strict=True):
        length = sequence.query.shape[1]
        for position in range(length):
            block, offset = sequence.table[position // block_size], position % block_size
            if position >= length - new:
                slots.append(block * block_size + offset)
            else:
                kv[block, :, 0, offset] = sequence.key[:, position]
                kv[block, :, 1, offset] = sequence.value[:, position]
    plan = backend.plan(
        StepShape(
            query_lengths=news,
            kv_lengths=[sequence.query.shape[1] for sequence in sequences],
            block_tables=[sequence.table for sequence in sequences],
            num_decodes=sum(new == 1 for new in news),
            slots=np.array(slots),
        )
    )
    for layer in range(LAYERS):
        pairs = list(zip(sequences, news, strict=True))
        out = backend.attend(
            plan,
            layer,
            torch.cat([s.query[layer, -new:] for s, new in pairs]),
            torch.cat([s.key[layer, -new:] for s, new in pairs]),
            torch.cat([s.value[layer, -new:] for s, new in pairs]),
            SCALE,
        )
        expected = torch.cat([s.expected(layer, s.query.shape[1] - new) for s, new in pairs])
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    for sequence in sequences:
        for position in range(sequence.query.shape[1]):
            block, offset = sequence.table[position // block_size], position % block_size
            torch.testing.assert_close(kv[block, :, 0, offset], sequence.key[:, position])
            torch.testing.assert_close(kv[block, :, 1, offset], sequence.value[:, position])


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 120), st.integers(1, 40)), min_size=1, max_size=8),
    heads=st.sampled_from([(4, 4), (6, 2), (5, 1)]),
    block_size=st.sampled_from([1, 4, 16]),
    seed=st.integers(0, 2**31),
)
def test_equals_attention_written_out_whatever_the_empty_slots_hold(
    shapes: list[tuple[int, int]], heads: tuple[int, int], block_size: int, seed: int
) -> None:
    torch.manual_seed(seed)
    free = list(range(NUM_BLOCKS))
    random.Random(seed).shuffle(free)
    shapes = sorted(shapes, key=lambda shape: shape[1] > 1)
    sequences, news = [], []
    for length, new in shapes:
        length = min(length, len(free) * block_size)
        if length == 0:
            break
        table = [free.pop() for _ in range(-(-length // block_size))]
        sequences.append(Sequence(length, heads[0], heads[1], table))
        news.append(min(new, length))
    order = sorted(range(len(news)), key=lambda i: news[i] > 1)
    attend([sequences[i] for i in order], [news[i] for i in order], heads[0], heads[1], block_size)


def test_decodes_of_very_different_length_share_no_padding() -> None:
    torch.manual_seed(0)
    free = list(range(NUM_BLOCKS))
    lengths = [3, 400, 5, 390, 1]
    sequences = [Sequence(n, 4, 2, [free.pop() for _ in range(-(-n // 16))]) for n in lengths]
    attend(sequences, [1] * len(lengths), 4, 2, 16)


def test_blocks_shared_by_two_sequences_serve_both() -> None:
    torch.manual_seed(0)
    first = Sequence(20, 4, 2, [7, 3, 9])
    second = Sequence(18, 4, 2, [7, 3, 1])
    for name in ("key", "value"):
        getattr(second, name)[:, :16] = getattr(first, name)[:, :16]
    attend([first, second], [1, 1], 4, 2, 8)


@given(st.lists(st.integers(1, 5000), max_size=40), st.integers(1, 50_000))
def test_grouping_takes_each_sequence_once_and_wastes_little(
    lengths: list[int], most_tokens: int
) -> None:
    groups = group_by_length(lengths, most_tokens)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        longest = max(lengths[i] for i in group)
        assert all(longest - lengths[i] <= max(longest / 4, 64) for i in group)
        assert len(group) == 1 or len(group) * longest <= most_tokens


@pytest.mark.parametrize("lengths", [[5], [600, 590, 610], [64, 1]])
def test_like_lengths_stay_one_group_in_order(lengths: list[int]) -> None:
    assert group_by_length(lengths, 10_000) == [list(range(len(lengths)))]
