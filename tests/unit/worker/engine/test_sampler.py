"""The sampler: distributions, truncation, and choices that depend on nothing but their own row."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.engine.sampler import SamplingBatch, row_key, sample
from services.worker.messages import SamplingParams

GREEDY = SamplingParams()


def draw(logits: torch.Tensor, params: SamplingParams, count: int) -> torch.Tensor:
    """Draws at `count` positions from one row of logits; returns how often each token came."""
    batch = SamplingBatch([params] * count, range(count))
    return torch.bincount(sample(logits.expand(count, -1), batch), minlength=logits.shape[-1])


def within_five_sigma(counts: torch.Tensor, probabilities: torch.Tensor) -> bool:
    total = counts.sum()
    sigma = (total * probabilities * (1 - probabilities)).sqrt()
    return bool(((counts - total * probabilities).abs() <= 5 * sigma + 1e-6).all())


def test_temperature_zero_takes_the_likeliest_and_the_first_of_equals() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, -1.0, 2.0]])
    assert sample(logits, SamplingBatch([GREEDY] * 2, [0, 0])).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_the_softmax_says(temperature: float) -> None:
    logits = torch.tensor([1.0, 0.0, 2.0, -1.0, 0.5])
    counts = draw(logits, SamplingParams(temperature=temperature, seed=3), 20_000)
    assert within_five_sigma(counts, (logits / temperature).softmax(-1))


def test_top_k_leaves_the_k_likeliest_in_proportion() -> None:
    logits = torch.tensor([1.0, 0.0, 2.0, -1.0, 0.5])
    counts = draw(logits, SamplingParams(temperature=1.0, top_k=2, seed=4), 20_000)
    expected = torch.zeros(5)
    expected[[0, 2]] = logits[[0, 2]].softmax(-1)
    assert within_five_sigma(counts, expected)


def test_top_p_leaves_the_fewest_that_reach_it() -> None:
    probabilities = torch.tensor([0.15, 0.5, 0.05, 0.3])
    params = SamplingParams(temperature=1.0, top_p=0.75, seed=5)
    counts = draw(probabilities.log(), params, 20_000)
    assert within_five_sigma(counts, torch.tensor([0.0, 0.625, 0.0, 0.375]))


def test_top_p_applies_to_what_top_k_left() -> None:
    probabilities = torch.tensor([0.4, 0.3, 0.2, 0.1])
    params = SamplingParams(temperature=1.0, top_k=2, top_p=0.55, seed=5)
    # Of the two that are left the first has 4/7 > 0.55.
    assert draw(probabilities.log(), params, 500).tolist() == [500, 0, 0, 0]


def test_a_tiny_top_p_is_greedy() -> None:
    logits = torch.tensor([1.0, 0.0, 2.0])
    assert draw(logits, SamplingParams(temperature=5.0, top_p=1e-9), 200).tolist() == [0, 0, 200]


@settings(max_examples=50, deadline=None)
@given(
    params=st.builds(
        SamplingParams,
        temperature=st.floats(0.01, 5),
        top_k=st.integers(0, 60),
        top_p=st.floats(0.01, 1),
        seed=st.integers(0, 2**64 - 1),
    ),
    position=st.integers(0, 2**20),
    others=st.lists(
        st.builds(
            SamplingParams,
            temperature=st.sampled_from([0.0, 0.7]),
            top_k=st.sampled_from([0, 3]),
            top_p=st.sampled_from([0.5, 1.0]),
        ),
        max_size=4,
    ),
    row_seed=st.integers(0, 1000),
)
def test_a_choice_does_not_depend_on_its_batch(
    params: SamplingParams, position: int, others: list[SamplingParams], row_seed: int
) -> None:
    generator = torch.Generator().manual_seed(row_seed)
    logits = torch.randn(len(others) + 1, 50, generator=generator) * 3
    alone = sample(logits[-1:], SamplingBatch([params], [position])).item()
    together = sample(logits, SamplingBatch([*others, params], [*range(len(others)), position]))
    assert together[-1] == alone
    assert 0 <= alone < 50


def test_seed_and_position_both_change_the_choice() -> None:
    logits = torch.zeros(1, 4096)

    def choice(seed: int, position: int) -> float:
        params = SamplingParams(temperature=1.0, seed=seed)
        return sample(logits, SamplingBatch([params], [position])).item()

    chosen = {choice(seed, position) for seed in range(8) for position in range(8)}
    assert len(chosen) > 55
    assert choice(2, 3) == choice(2, 3)


def test_row_keys_of_neighbouring_seeds_and_positions_differ() -> None:
    keys = {row_key(seed, position) for seed in range(100) for position in range(100)}
    assert len(keys) == 100 * 100
    assert all(0 <= key < 2**64 for key in keys)


def test_logits_that_are_minus_infinity_are_never_drawn() -> None:
    logits = torch.full((1000, 6), -math.inf)
    logits[:, 4] = 0.0
    batch = SamplingBatch([SamplingParams(temperature=1.0)] * 1000, range(1000))
    assert set(sample(logits, batch).tolist()) == {4}


@pytest.mark.parametrize(
    "params", [GREEDY, SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_k=2)]
)
def test_nan_is_told_and_disturbs_no_other_row(params: SamplingParams) -> None:
    logits = torch.zeros(3, 5)
    logits[:, 2] = 50.0
    logits[1, 3] = math.nan
    assert sample(logits, SamplingBatch([params] * 3, [1, 2, 3])).tolist() == [2, -1, 2]


def test_no_rows_give_no_tokens() -> None:
    assert sample(torch.empty(0, 7), SamplingBatch([], [])).tolist() == []
