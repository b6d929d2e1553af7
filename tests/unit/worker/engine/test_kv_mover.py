"""Loads by groups of layers, and what compute waits for."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest

from services.worker.engine.transfer import Priority
from services.worker.messages import Evict, EvictMode
from tests.support.engine_harness import EngineHarness, continuation
from tests.support.manual_stream import ManualStream


@pytest.fixture
def engine() -> Iterator[EngineHarness]:
    harness = EngineHarness()
    yield harness
    harness.close()


def sleep_scrubbed(engine: EngineHarness, name: str = "a", first_token: int = 1) -> list[int]:
    """Generates in a session and evicts it; returns its context."""
    prompt = list(range(first_token, first_token + 19))
    made = engine.generate(name, prompt)
    engine.carry_out(name, Evict(EvictMode.SCRUB))
    return [*prompt, *made]


def test_each_group_of_layers_has_its_event_as_soon_as_the_session_is_held(
    engine: EngineHarness,
) -> None:
    context = sleep_scrubbed(engine)
    session = engine.session("a")
    assert engine.mover.hold(session, Priority.WAKE, layer_groups=2)
    (first,), (second,) = engine.mover.load_events(session, 2)
    assert first is not second
    second.synchronize()
    assert first.query()
    # Divided otherwise, or not at all, it is waited for to its end.
    assert engine.mover.load_events(session, 4) == [[second]] * 4
    assert engine.mover.load_events(session, 1) == [[second]]
    engine.run(until=lambda: not session.loading)
    assert engine.mover.load_events(session, 2) == [[], []]
    assert engine.generate("a", [5]) == continuation([*context, 5], 4)


def test_a_prefetch_that_becomes_a_wake_is_launched_at_once() -> None:
    engine = EngineHarness(ahead_bytes=1)
    sleep_scrubbed(engine, "a")
    sleep_scrubbed(engine, "b", first_token=2)
    early, late = engine.session("a"), engine.session("b")
    for session in (early, late):
        assert engine.mover.hold(session, Priority.PREFETCH)
    with pytest.raises(AssertionError, match="not launched yet"):
        engine.mover.load_events(late, 2)
    assert engine.mover.hold(late, Priority.WAKE, layer_groups=2)
    (first,), (second,) = engine.mover.load_events(late, 2)
    assert first is second
    second.synchronize()
    engine.close()


def test_how_long_a_load_goes_on_is_known_from_earlier_ones(engine: EngineHarness) -> None:
    for name, first_token in (("a", 1), ("b", 2)):
        sleep_scrubbed(engine, name, first_token)
    a, b = engine.session("a"), engine.session("b")
    assert engine.mover.hold(a, Priority.WAKE)
    assert engine.mover.loading_s(a) == math.inf  # nothing was ever loaded
    engine.run(until=lambda: not a.loading)
    assert engine.mover.hold(b, Priority.WAKE)
    assert engine.mover.loading_s(b) <= b.source.loaded_bytes / engine.mover.load_bytes_per_s
    assert engine.mover.loading_s(b) > engine.mover.loading_s(b)  # time goes on
    engine.carry_out("a", Evict(EvictMode.SCRUB))
    engine.run(until=lambda: not b.loading)


def test_nobody_knows_how_long_a_load_goes_on_beside_another() -> None:
    engine = EngineHarness(ahead_bytes=1, make_stream=ManualStream)
    engine.mover.load_bytes_per_s = 1e9
    for name in "ab":
        engine.submit(name, [ord(name)] * 9, max_tokens=1)
    run_to_rest(engine)
    for name in "ab":
        engine.command(name, Evict(EvictMode.RELEASE))
    run_to_rest(engine)
    a, b = engine.session("a"), engine.session("b")
    assert engine.mover.hold(a, Priority.WAKE)
    assert engine.mover.loading_s(a) < 1
    assert engine.mover.hold(b, Priority.PREFETCH)
    assert engine.mover.loading_s(a) == math.inf
    engine.close()


def run_to_rest(engine: EngineHarness) -> None:
    """Runs all that was launched on hand-driven streams, and what follows from it."""
    engine.turn()
    while not engine.engine.idle:
        for stream in engine.streams.values():
            assert isinstance(stream, ManualStream)
            stream.run()
        engine.turn()
