"""The seven ordering rules, each kept and each broken.

Every scenario drives the streams by hand into the order that corrupts KV where a rule's wait is
missing, and returns whether the agents' tokens are right all the same. With the wait taken out it
must find the damage, else it proves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from services.worker.engine.block_manager import BlockManager
from services.worker.engine.slot_reuse import SlotReuse
from services.worker.messages import Abort, Close, Evict, EvictMode, Restore
from tests.support.engine_harness import BLOCK, EngineHarness, ScrubbedReadError, continuation
from tests.support.manual_stream import ManualStream

PROMPT = list(range(10, 10 + 2 * BLOCK + 1))
OTHER = list(range(500, 500 + 2 * BLOCK + 1))


class Stage:
    """A harness on hand-driven streams."""

    def __init__(self, **options: int | bool) -> None:
        self.harness = EngineHarness(make_stream=ManualStream, **options)  # type: ignore[arg-type]

    def stream(self, name: str) -> ManualStream:
        stream = self.harness.streams[name]
        assert isinstance(stream, ManualStream)
        return stream

    def finish(self, order: tuple[str, ...] = ("compute", "load", "store")) -> None:
        """Runs everything to its end; `order` says which stream is ahead of which."""
        self.harness.turn()
        for _ in range(200):
            if self.harness.engine.idle:
                return
            for name in order:
                self.stream(name).run()
                self.harness.turn()
        raise AssertionError("the engine never comes to rest")

    def generate(self, session_id: str, append: list[int], count: int = 2) -> list[int]:
        """Runs a whole request."""
        request_id = self.harness.submit(session_id, append, max_tokens=count)
        self.finish()
        tokens = self.harness.generation(request_id).tokens
        assert tokens is not None
        return tokens

    def right(self, request_id: str, context: list[int], count: int) -> bool:
        """Returns whether a request got the tokens that it must get."""
        return self.harness.generation(request_id).tokens == continuation(context, count)

    def wakes_right(self, session_id: str) -> bool:
        """Evicts a session down to its host copies, and returns whether it goes on rightly."""
        log = list(self.harness.session(session_id).tokens)
        self.harness.command(session_id, Evict(EvictMode.SCRUB))
        self.finish()
        return self.generate(session_id, [3]) == continuation([*log, 3], 2)


def rule_1_a_store_waits_for_the_compute_that_wrote_the_block() -> bool:
    stage = Stage()
    stage.harness.submit("a", PROMPT, max_tokens=2)
    stage.harness.turn()  # launches the prefill and, behind it, the stores of its full blocks
    stage.stream("store").run()
    stage.finish()
    return stage.wakes_right("a")


def rule_2_compute_reads_a_restored_block_only_after_its_load() -> bool:
    stage = Stage()
    log = PROMPT + stage.generate("a", PROMPT)
    stage.harness.command("a", Evict(EvictMode.SCRUB))
    stage.finish()
    stage.harness.clock.ahead = False
    request_id = stage.harness.submit("a", [3], max_tokens=2)
    for _ in range(3):
        stage.harness.turn()
        stage.stream("compute").run()
    stage.finish()
    return stage.right(request_id, [*log, 3], 2)


def rule_2_a_step_launched_while_a_load_goes_on_reads_only_after_it() -> bool:
    stage = Stage()
    log = PROMPT + stage.generate("a", PROMPT)
    stage.harness.command("a", Evict(EvictMode.SCRUB))
    stage.finish()
    request_id = stage.harness.submit("a", [3], max_tokens=2)
    stage.harness.turn()
    assert any(plan.after for plan in stage.harness.runner.plans)
    stage.stream("compute").run()
    stage.finish()
    return stage.right(request_id, [*log, 3], 2)


def rule_3_a_device_block_is_not_handed_out_while_a_store_reads_it() -> bool:
    stage = Stage(device_blocks=4, write_through=False)
    log = PROMPT + stage.generate("a", PROMPT, 1)
    stage.harness.command("a", Evict())
    stage.finish()  # its tail of one token is stored
    stage.generate("a", [3], 1)
    stage.harness.command("a", Evict())
    stage.harness.turn()  # the tail has three tokens now, and its store is to come
    cut = stage.harness.submit("a", full_context=log)
    stage.harness.engine.handle(Abort(cut))  # it has one again, which the host has already
    stage.harness.submit("b", [*OTHER, 1, 2, 3, 4], max_tokens=1)
    stage.finish(("compute", "store", "load"))
    stage.harness.command("b", Close())
    request_id = stage.harness.submit("a", full_context=log, max_tokens=2)
    stage.finish()
    return stage.right(request_id, log, 2)


def rule_4_a_device_block_is_not_handed_out_while_a_load_writes_it() -> bool:
    stage = Stage(device_blocks=5)
    stage.generate("a", PROMPT)
    stage.harness.command("a", Evict(EvictMode.RELEASE))
    stage.finish()
    stage.harness.command("a", Restore())
    stage.harness.turn()
    stage.harness.command("a", Close())
    request_id = stage.harness.submit("b", [*OTHER, 1, 2, 3, 4], max_tokens=3)
    stage.harness.turn()
    stage.stream("compute").run()
    stage.finish(("load", "compute", "store"))
    return stage.right(request_id, [*OTHER, 1, 2, 3, 4], 3)


def rule_5_a_host_block_is_not_handed_out_while_a_load_reads_it() -> bool:
    stage = Stage(host_blocks=4, write_through=False)
    log = PROMPT + stage.generate("a", PROMPT)
    stage.generate("b", OTHER)
    stage.harness.command("a", Evict(EvictMode.RELEASE))
    stage.finish()
    stage.harness.command("a", Restore())
    stage.harness.turn()
    stage.harness.command("b", Evict())  # wants three host blocks, and one is free
    stage.finish(("store", "load", "compute"))
    return stage.generate("a", [3]) == continuation([*log, 3], 2)


def rule_6_a_host_block_is_not_handed_out_while_a_store_writes_it() -> bool:
    stage = Stage(host_blocks=4, write_through=False, ahead_bytes=1)
    for session_id, first in (("x", 1), ("a", 2), ("c", 3)):
        stage.generate(session_id, [first, *range(BLOCK - 2)], 1)  # one block each
    stage.generate("c", [9] * 8)
    stage.harness.mover.write_through(  # holds up the store stream
        stage.harness.session("x").kv.blocks, stage.stream("compute").record()
    )
    stage.stream("compute").run()
    stage.harness.mover.write_through(
        stage.harness.session("a").kv.blocks, stage.stream("compute").record()
    )
    stage.stream("compute").run()
    stage.harness.command("a", Close())
    stage.harness.command("c", Evict())  # more urgent than what waits for the store stream
    stage.finish()
    return stage.wakes_right("c")


def rule_7_a_load_writes_a_device_block_only_after_the_last_step_that_touches_it() -> bool:
    stage = Stage(device_blocks=6, write_through=False)
    log = PROMPT + stage.generate("a", PROMPT)
    stage.harness.command("a", Evict(EvictMode.RELEASE))
    stage.finish()
    stage.harness.submit("b", OTHER + OTHER, max_tokens=2)  # five blocks
    stage.harness.turn()  # its first step is launched, and runs later
    stage.harness.command("b", Close())
    stage.harness.command("a", Restore())
    stage.harness.turn()
    stage.stream("load").run()
    stage.stream("compute").run()
    stage.finish()
    return stage.generate("a", [3]) == continuation([*log, 3], 2)


def _never(_: object) -> bool:
    return False


def _without_waits(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Makes one stream go on without waiting for any event."""

    def take_out(patch: pytest.MonkeyPatch) -> None:
        wait = ManualStream.wait

        def wait_unless(self: ManualStream, event: object) -> None:
            if self.name != name:
                wait(self, event)  # type: ignore[arg-type]

        patch.setattr(ManualStream, "wait", wait_unless)

    return take_out


def _without(
    owner: type, method: str, instead: Callable[[object], bool]
) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(owner, method, staticmethod(instead))


RULES = [
    (rule_1_a_store_waits_for_the_compute_that_wrote_the_block, _without_waits("store")),
    (
        rule_2_compute_reads_a_restored_block_only_after_its_load,
        _without(BlockManager, "loaded", lambda _: True),
    ),
    (
        rule_2_a_step_launched_while_a_load_goes_on_reads_only_after_it,
        _without_waits("compute"),
    ),
    (
        rule_3_a_device_block_is_not_handed_out_while_a_store_reads_it,
        _without(SlotReuse, "_store_reads_device", _never),
    ),
    (
        rule_4_a_device_block_is_not_handed_out_while_a_load_writes_it,
        _without(SlotReuse, "_load_writes_device", _never),
    ),
    (
        rule_5_a_host_block_is_not_handed_out_while_a_load_reads_it,
        _without(SlotReuse, "_load_reads_host", _never),
    ),
    (
        rule_6_a_host_block_is_not_handed_out_while_a_store_writes_it,
        _without(SlotReuse, "_store_writes_host", _never),
    ),
    (
        rule_7_a_load_writes_a_device_block_only_after_the_last_step_that_touches_it,
        _without_waits("load"),
    ),
]
IDS = [scenario.__name__ for scenario, _ in RULES]


@pytest.mark.parametrize("scenario", [scenario for scenario, _ in RULES], ids=IDS)
def test_the_rule_holds(scenario: Callable[[], bool]) -> None:
    assert scenario()


@pytest.fixture
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.mark.parametrize(("scenario", "take_out"), RULES, ids=IDS)
def test_without_its_wait_the_damage_is_found(
    scenario: Callable[[], bool],
    take_out: Callable[[pytest.MonkeyPatch], None],
    patch: pytest.MonkeyPatch,
) -> None:
    take_out(patch)
    # Bookkeeping that contradicts itself would end the scenario before the damage is done.
    patch.setattr(BlockManager, "check_integrity", lambda *_: None)
    try:
        right = scenario()
    except ScrubbedReadError:
        right = False
    assert not right
