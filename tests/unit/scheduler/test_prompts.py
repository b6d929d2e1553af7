from __future__ import annotations

from services.scheduler.prompts import ASSUMED_TOKENS, PATIENCE_S, Prompts


def test_prompts_add_up_until_they_end():
    prompts = Prompts()
    prompts.begin("a", 100, 0.0)
    prompts.begin("b", 50, 0.0)
    prompts.begin("a", 70, 0.0)
    assert prompts.tokens == 120
    assert prompts.end("a")
    assert not prompts.end("a")
    assert prompts.tokens == 50


def test_what_is_computed_counts_for_the_oldest_that_has_arrived():
    prompts = Prompts()
    for name in "abc":
        prompts.begin(name, 100, 0.0)
    prompts.started("b")
    prompts.started("c")
    prompts.computed(150)
    assert prompts.tokens == 150
    assert prompts.end("a")
    assert not prompts.end("b")
    assert prompts.tokens == 50
    prompts.computed(1000)
    assert prompts.tokens == 0


def test_one_that_never_arrives_is_waited_for_only_so_long():
    prompts = Prompts()
    prompts.begin("gone", 100, 0.0)
    prompts.begin("slow", 100, 0.0)
    prompts.started("slow")
    prompts.begin("new", 100, PATIENCE_S)
    prompts.expire(PATIENCE_S)
    assert prompts.tokens == 300
    prompts.expire(PATIENCE_S + 1)
    assert prompts.tokens == 200
    assert not prompts.end("gone")


def test_a_first_prompt_counts_for_what_it_is_once_it_has_arrived():
    prompts = Prompts()
    prompts.begin("a", prompts.typical_tokens, 0.0)
    assert prompts.tokens == ASSUMED_TOKENS
    prompts.started("a", 50)
    assert prompts.tokens == 50
    prompts.started("a")
    assert prompts.tokens == 50


def test_first_prompts_are_taken_to_be_as_long_as_those_before():
    prompts = Prompts()
    prompts.started("a", 50)
    assert prompts.typical_tokens == 50
    for name in "bcdef":
        prompts.started(name, 100)
    assert 80 < prompts.typical_tokens < 100
    prompts.started("a")
    assert 80 < prompts.typical_tokens < 100
    for _ in range(100):
        prompts.started("g", 1000)
    assert prompts.typical_tokens > 900
