from __future__ import annotations

from services.scheduler.prompts import PATIENCE_S, Prompts


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
