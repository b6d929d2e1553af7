"""Steps launched early: behind one whose tokens nobody knows yet, or behind a load of their KV."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import pytest

from services.worker.messages import (
    Abort,
    Close,
    Evict,
    EvictMode,
    FinishReason,
    Open,
    Started,
    StopAt,
    Tokens,
)
from tests.support.engine_harness import BLOCK, POISON, continuation
from tests.support.hand_driven import HandDriven

PROMPT = list(range(10, 10 + 2 * BLOCK - 1))
"""One short of two blocks: the first decode fills the second."""


@pytest.fixture
def stage() -> Iterator[HandDriven]:
    stage = HandDriven()
    yield stage
    stage.close()


def test_two_steps_are_in_flight_and_no_third(stage: HandDriven) -> None:
    request = stage.submit("a", PROMPT, max_tokens=8)
    stage.turn()
    stage.turn()
    first, second = stage.runner.plans
    assert first.slices[0].follows is None
    assert (second.slices[0].follows, second.slices[0].start) == (0, len(PROMPT))
    stage.step()
    assert stage.generation(request).tokens == continuation(PROMPT, 1)
    assert len(stage.runner.plans) == 3
    stage.finish()
    assert stage.generation(request).tokens == continuation(PROMPT, 8)


def test_a_slice_follows_its_own_sequence_wherever_it_stood(stage: HandDriven) -> None:
    requests = {name: stage.submit(name, [ord(name)], max_tokens=3) for name in "ab"}
    stage.turn()
    requests["c"] = stage.submit("c", [7, 8, 9], max_tokens=6, priority=1)
    stage.finish()
    contexts = {"a": [ord("a")], "b": [ord("b")], "c": [7, 8, 9]}
    for name, count in (("a", 3), ("b", 3), ("c", 6)):
        expected = continuation(contexts[name], count)
        assert stage.generation(requests[name]).tokens == expected
    places = [[part.follows for part in plan.slices] for plan in stage.runner.plans]
    assert any(follows not in ([*range(len(follows))], [None] * len(follows)) for follows in places)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_no_step_goes_beyond_the_most_tokens_wanted(stage: HandDriven, count: int) -> None:
    request = stage.submit("a", PROMPT, max_tokens=count)
    stage.finish()
    assert len(stage.runner.plans) == count
    found = stage.generation(request)
    assert found.tokens == continuation(PROMPT, count)
    assert found.finished is not None
    assert found.finished.reason is FinishReason.LENGTH


@pytest.mark.parametrize("kept", [1, 2, 3, 4])
def test_a_stop_token_found_late_ends_the_log_there(stage: HandDriven, kept: int) -> None:
    expected = continuation(PROMPT, kept)
    request = stage.submit("a", PROMPT, max_tokens=9, stop=expected[-1:])
    stage.finish()
    found = stage.generation(request)
    assert found.tokens == expected
    assert found.finished is not None
    assert found.finished.context_length == len(PROMPT) + kept
    # The step behind has computed the KV of the last token.
    assert stage.session("a").kv.tokens == len(PROMPT) + kept
    assert stage.goes_on_rightly("a", PROMPT + expected)


def test_what_a_step_fills_behind_a_stop_is_found_by_others(stage: HandDriven) -> None:
    (last,) = continuation(PROMPT, 1)
    stage.submit("a", PROMPT, stop=[last])
    stage.finish()
    request = stage.submit("b", [*PROMPT, last, 5], max_tokens=2)
    stage.finish()
    started = stage.generation(request).started
    assert started is not None
    assert started.cached_tokens == 2 * BLOCK
    assert stage.generation(request).tokens == continuation([*PROMPT, last, 5], 2)


def test_what_a_step_fills_behind_a_cancel_is_found_by_nobody(stage: HandDriven) -> None:
    cancelled = stage.submit("a", PROMPT)
    stage.turn()
    stage.engine.handle(Abort(cancelled))
    stage.finish()
    assert stage.generation(cancelled).tokens == []
    request = stage.submit("b", [*PROMPT, *continuation(PROMPT, 1), 5], max_tokens=2)
    stage.finish()
    started = stage.generation(request).started
    assert started is not None
    assert started.cached_tokens == BLOCK
    assert stage.goes_on_rightly("a", PROMPT)


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_a_cancel_leaves_the_tokens_that_were_given(stage: HandDriven, steps: int) -> None:
    request = stage.submit("a", PROMPT, max_tokens=9)
    stage.turn()
    stage.step(steps)
    stage.engine.handle(Abort(request))
    assert stage.session("a").kv.tokens <= len(stage.session("a").tokens)
    stage.finish()
    given = stage.generation(request).tokens
    assert given == continuation(PROMPT, steps)
    assert stage.goes_on_rightly("a", PROMPT + given)


def test_a_close_leaves_nothing_and_its_blocks_serve_others(stage: HandDriven) -> None:
    request = stage.submit("a", PROMPT, max_tokens=9)
    stage.turn()
    stage.step()
    stage.command("a", Close())
    other = stage.submit("b", range(200, 230), max_tokens=5)
    stage.finish()
    rejected = stage.generation(request).rejected
    assert rejected is not None
    assert rejected.error.reason == "SESSION_CLOSED"
    assert stage.generation(other).tokens == continuation(range(200, 230), 5)
    stage.command("a", Open())
    assert stage.goes_on_rightly("a", [])


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_a_stop_string_cuts_what_is_in_flight(stage: HandDriven, kept: int) -> None:
    request = stage.submit("a", PROMPT, max_tokens=9)
    stage.turn()
    stage.step(2)
    stage.engine.handle(StopAt(request, "a", len(PROMPT) + kept))
    stage.finish()
    finished = stage.generation(request).finished
    assert finished is not None
    assert finished.completion_tokens == kept
    assert stage.goes_on_rightly("a", PROMPT + continuation(PROMPT, kept))


def test_a_new_request_may_come_while_steps_of_the_last_are_in_flight(stage: HandDriven) -> None:
    stopped = stage.submit("a", PROMPT, max_tokens=9)
    stage.turn()
    stage.step()
    log = PROMPT + continuation(PROMPT, 1)
    stage.engine.handle(StopAt(stopped, "a", len(log)))
    request = stage.submit("a", [3, 4], max_tokens=4)
    stage.finish()
    assert stage.generation(request).tokens == continuation([*log, 3, 4], 4)


def test_logits_that_are_not_numbers_fail_one_request_once(stage: HandDriven) -> None:
    bad = stage.submit("a", [*PROMPT, POISON], max_tokens=9)
    good = stage.submit("b", PROMPT, max_tokens=9)
    stage.turn()
    assert [part.follows for part in stage.runner.plans[1].slices] == [0, 1]
    stage.finish()
    found = stage.generation(bad)
    assert found.rejected is not None
    assert (found.rejected.error.code, found.tokens) == ("INTERNAL", [])
    assert stage.engine.report().counters.requests_failed == 1
    assert stage.session("a").kv.blocks == []
    assert stage.generation(good).tokens == continuation(PROMPT, 9)


def test_a_preempted_sequence_gets_the_token_that_was_in_flight() -> None:
    stage = HandDriven(device_blocks=7)
    contexts = {name: [ord(name), *PROMPT] for name in "ab"}
    requests = {name: stage.submit(name, log, max_tokens=12) for name, log in contexts.items()}
    stage.turn()
    first, last = (stage.session(name) for name in "ab")
    while last.kv.held:
        stage.step()
    assert last.request is not None
    assert last.request.unaccepted == 1
    assert first.kv.held
    stage.finish()
    for name, log in contexts.items():
        assert stage.generation(requests[name]).tokens == continuation(log, 12)
    stage.close()


def test_first_tokens_are_told_first(stage: HandDriven) -> None:
    decoding = stage.submit("a", [1], max_tokens=9)
    stage.turn()
    waking = stage.submit("b", [2, 3], max_tokens=9)
    stage.step(1)
    stage.heard.clear()
    stage.step(2)
    told = [message.request_id for message in stage.heard if isinstance(message, Tokens)]
    assert told == [decoding, waking, decoding]


def test_tokens_are_ready_before_the_turn_goes_on(stage: HandDriven) -> None:
    request = stage.submit("a", PROMPT, max_tokens=9)
    stage.turn()
    stage.stream("compute").run(1)
    stage.engine.collect()
    told = [m for m in stage.engine.outbox if isinstance(m, Tokens)]
    assert [(m.request_id, m.token_ids) for m in told] == [(request, continuation(PROMPT, 1))]
    assert len(stage.runner.plans) == 2


def test_until_the_next_step_is_due_others_may_join_it(
    stage: HandDriven, monkeypatch: pytest.MonkeyPatch
) -> None:
    due_s = time.monotonic() + 1e6
    monkeypatch.setattr(
        stage.clock, "due_s", lambda _: due_s if stage.clock._in_flight else -math.inf
    )
    first = stage.submit("a", PROMPT, max_tokens=4)
    stage.turn()
    engine = stage.engine
    assert engine.due_s == due_s
    waking = stage.submit("b", [5, 6], max_tokens=4)
    stage.turn()
    assert len(stage.runner.plans) == 1
    monkeypatch.undo()
    stage.turn()
    assert stage.engine.due_s is None
    assert [part.follows for part in stage.runner.plans[1].slices] == [0, None]
    stage.finish()
    assert stage.generation(first).tokens == continuation(PROMPT, 4)
    assert stage.generation(waking).tokens == continuation([5, 6], 4)


def evicted(stage: HandDriven, session_id: str) -> list[int]:
    """Generates and evicts for good; returns the log."""
    stage.submit(session_id, PROMPT)
    stage.finish()
    stage.command(session_id, Evict(EvictMode.RELEASE))
    stage.finish()
    return stage.session(session_id).tokens.copy()


def test_a_step_waits_for_the_last_of_a_load_on_the_device(stage: HandDriven) -> None:
    log = evicted(stage, "a")
    request = stage.submit("a", [3], max_tokens=3)
    stage.turn()
    assert [bool(plan.after) for plan in stage.runner.plans[-2:]] == [True, False]
    assert stage.stream("compute").run() == 0
    stage.turn()
    assert stage.generation(request).started is None
    stage.finish()
    found = stage.generation(request)
    assert found.tokens == continuation([*log, 3], 3)
    assert found.started is not None
    assert found.started.kv.loaded_blocks == 3
    assert 0 < found.started.kv.load_start_ns <= found.started.kv.load_end_ns
    told = [type(m) for m in stage.heard if getattr(m, "request_id", None) == request]
    assert told.index(Started) < told.index(Tokens)


def test_a_load_that_goes_on_for_long_is_waited_for_by_the_host(stage: HandDriven) -> None:
    log = evicted(stage, "a")
    stage.clock.ahead = False
    launched = len(stage.runner.plans)
    request = stage.submit("a", [3], max_tokens=3)
    stage.turn()
    assert len(stage.runner.plans) == launched
    stage.finish()
    assert not any(plan.after for plan in stage.runner.plans)
    assert stage.generation(request).tokens == continuation([*log, 3], 3)


def test_nobody_waits_for_the_load_of_another(stage: HandDriven) -> None:
    log = evicted(stage, "a")
    running = stage.submit("b", [1, 2], max_tokens=5)
    stage.turn()
    waking = stage.submit("a", [3], max_tokens=3)
    stage.step(4)
    assert stage.generation(running).tokens == continuation([1, 2], 4)
    stage.finish()
    assert stage.generation(waking).tokens == continuation([*log, 3], 3)


def test_one_who_is_cancelled_before_its_load_ends_never_starts(stage: HandDriven) -> None:
    log = evicted(stage, "a")
    request = stage.submit("a", [3], max_tokens=3)
    stage.turn()
    stage.engine.handle(Abort(request))
    stage.finish()
    found = stage.generation(request)
    assert found.rejected is not None
    assert (found.started, found.tokens) == (None, [])
    assert stage.goes_on_rightly("a", [*log, 3])
