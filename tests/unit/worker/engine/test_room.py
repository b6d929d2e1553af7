"""Restores of more sessions than fit on the device, and the requests that follow."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from services.worker.messages import (
    CommandDone,
    Evict,
    EvictMode,
    Prefetch,
    Restore,
    SessionEvent,
    SessionEventKind,
)
from tests.support.engine_harness import BLOCK, EngineHarness, continuation
from tests.support.manual_stream import ManualStream

NAMES = "abcd"  # three blocks each, and the device has room for two of them and one block


@pytest.fixture
def engine() -> Iterator[EngineHarness]:
    harness = EngineHarness(device_blocks=7, make_stream=ManualStream)
    for name in NAMES:
        harness.submit(name, prompt(name), max_tokens=1)
        run_to_rest(harness)
        evict(harness, name)
    yield harness
    harness.close()


def prompt(name: str) -> list[int]:
    return [ord(name)] * (2 * BLOCK + 1)


def evict(engine: EngineHarness, name: str) -> None:
    engine.command(name, Evict(EvictMode.RELEASE))
    run_to_rest(engine)


def run_to_rest(engine: EngineHarness) -> None:
    """Runs all that was launched on hand-driven streams, and what follows from it."""
    engine.turn()
    for _ in range(200):
        if engine.engine.idle:
            return
        for stream in engine.streams.values():
            assert isinstance(stream, ManualStream)
            stream.run()
        engine.turn()
    raise AssertionError("the engine never comes to rest")


def restore_all(engine: EngineHarness) -> list[str]:
    commands = [engine.command(name, Restore()) for name in NAMES]
    run_to_rest(engine)
    return commands


def held(engine: EngineHarness) -> str:
    return "".join(name for name in NAMES if engine.session(name).kv.held)


def loads(engine: EngineHarness) -> int:
    return engine.engine.report().counters.loads


def done(engine: EngineHarness, command: str) -> CommandDone:
    found = engine.done(command)
    assert found is not None
    return found


def test_restores_over_capacity_move_only_what_fits(engine: EngineHarness) -> None:
    commands = restore_all(engine)
    for _ in range(20):
        run_to_rest(engine)
    assert held(engine) == "ab"
    assert loads(engine) == 2
    assert [engine.done(command) is not None for command in commands] == [True, True, False, False]
    events = [message.kind for message in engine.heard if isinstance(message, SessionEvent)]
    assert SessionEventKind.EVICTED not in events


@pytest.mark.parametrize("order", list(itertools.permutations(NAMES)), ids="".join)
def test_requests_in_any_order_all_finish_after_restores_over_capacity(
    engine: EngineHarness, order: tuple[str, ...]
) -> None:
    commands = restore_all(engine)
    requests = {}
    for name in order:
        requests[name] = engine.submit(name, [3], max_tokens=2)
        engine.turn()
    run_to_rest(engine)
    for name, request in requests.items():
        log = [*prompt(name), *continuation(prompt(name), 1), 3]
        assert engine.generation(request).tokens == continuation(log, 2)
    assert all(done(engine, command).error is None for command in commands)
    assert loads(engine) <= 2 + len(NAMES)  # the restores that fitted, and one for each request


def test_requests_one_by_one_take_the_room_of_restored_sessions(engine: EngineHarness) -> None:
    restore_all(engine)
    for name in reversed(NAMES):
        request = engine.submit(name, [3], max_tokens=2)
        run_to_rest(engine)
        assert engine.generation(request).finished is not None


def test_a_restore_that_waits_is_carried_out_once_there_is_room(engine: EngineHarness) -> None:
    commands = restore_all(engine)
    evict(engine, "a")
    assert held(engine) == "bc"
    assert done(engine, commands[2]).moved_blocks == 3
    assert engine.done(commands[3]) is None


def test_a_session_that_has_had_its_request_makes_room_for_another_s_restore(
    engine: EngineHarness,
) -> None:
    commands = restore_all(engine)
    engine.submit("a", [3], max_tokens=1)
    run_to_rest(engine)
    assert held(engine) == "bc"
    assert done(engine, commands[2]).error is None


def test_a_wake_that_is_overdue_makes_room_for_another(engine: EngineHarness) -> None:
    restore_all(engine)
    engine.session("b").awaited_until_ns = 1
    run_to_rest(engine)
    assert held(engine) == "ac"


def test_a_restore_that_waits_ends_with_its_deadline(
    engine: EngineHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    restore_all(engine)
    late = engine.command("d", Restore(), deadline_ns=1 << 62)
    monkeypatch.setattr("services.worker.engine.commands.time.time_ns", lambda: (1 << 62) + 1)
    engine.turn()
    error = done(engine, late).error
    assert error is not None
    assert error.reason == "EXHAUSTED"


def test_a_restore_whose_session_got_a_request_meanwhile_moves_nothing(
    engine: EngineHarness,
) -> None:
    commands = restore_all(engine)
    engine.submit("d", [3], max_tokens=1)
    run_to_rest(engine)
    result = done(engine, commands[3])
    assert (result.error, result.moved_blocks) == (None, 0)


def test_a_request_is_not_robbed_by_commands_while_it_waits_for_room(
    engine: EngineHarness,
) -> None:
    engine.submit("big", [8] * (4 * BLOCK + 1), max_tokens=1)
    run_to_rest(engine)
    evict(engine, "big")
    engine.submit("x", [7] * (2 * BLOCK), max_tokens=BLOCK)
    engine.turn()
    request = engine.submit("big", [3], max_tokens=1)  # five blocks, and four are not x's
    engine.turn()
    engine.command("b", Restore())
    refused = engine.command("c", Prefetch())
    while not engine.session("big").kv.held:
        assert held(engine) == ""
        for stream in engine.streams.values():
            assert isinstance(stream, ManualStream)
            stream.run(1)
        engine.turn()
    run_to_rest(engine)
    assert engine.generation(request).finished is not None
    assert held(engine) == "b"
    error = done(engine, refused).error
    assert error is not None
    assert error.reason == "EXHAUSTED"


def test_a_prefetched_session_is_not_taken_for_a_restore(engine: EngineHarness) -> None:
    for name in "ab":
        engine.command(name, Prefetch())
    restore = engine.command("c", Restore())
    run_to_rest(engine)
    assert held(engine) == "ab"
    assert engine.done(restore) is None


def test_a_request_takes_the_room_of_who_is_not_awaited_first() -> None:
    engine = EngineHarness(device_blocks=7)
    for name in "ab":
        engine.generate(name, prompt(name), 1)
    engine.carry_out("a", Restore())  # used longest ago, but about to wake
    engine.generate("c", prompt("c"), 1)
    assert engine.session("a").kv.held
    assert not engine.session("b").kv.held
    engine.close()
