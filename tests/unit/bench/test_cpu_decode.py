"""The CPU benchmark's table and its own measuring, on a model small enough for a test."""

from __future__ import annotations

import pytest

from bench.__main__ import main, names
from bench.cpu_decode import (
    Round,
    make_prompts,
    measure_djinn,
    measure_generate,
    summarize,
)
from tests.support.model_driver import load_quietly


def test_the_table_has_medians_and_ratios() -> None:
    rounds = {
        "djinn": [Round(1.0, 90.0, [[1, 2], [3, 4]]), Round(3.0, 110.0, []), Round(2.0, 100.0, [])],
        "other": [Round(0.5, 50.0, [[1, 2], [3, 5]])],
    }
    ours, other = summarize(rounds, "other")
    assert (ours.first_s, ours.decode_tokens_per_s, ours.ratio) == (2.0, 100.0, 1.0)
    assert (other.ratio, other.same_tokens, ours.same_tokens) == (2.0, 1.0, 0.75)


def test_prompts_are_seeded_and_as_uneven_as_asked() -> None:
    prompts = make_prompts(5, 100, 0.2, 1000)
    assert [len(prompt) for prompt in prompts] == [100, 95, 90, 85, 80]
    assert prompts == make_prompts(5, 100, 0.2, 1000)
    assert [len(prompt) for prompt in make_prompts(1, 10, 0.5, 1000)] == [10]


def test_djinn_and_generate_do_the_same_work() -> None:
    loaded = load_quietly("dummy:tiny")
    prompts = make_prompts(3, 40, 0.5, loaded.vocab_size)
    ours = measure_djinn(loaded, prompts, 6)()
    theirs = measure_generate(loaded.model, prompts, 6)()
    assert ours.tokens == theirs.tokens
    assert [len(tokens) for tokens in ours.tokens] == [6, 6, 6]
    assert ours.decode_tokens_per_s > 0
    assert theirs.first_s > 0


def test_an_unknown_benchmark_is_told_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nonsense"]) == 2
    assert "cpu_decode" in capsys.readouterr().out
    assert "vllm_decode" not in names()
