"""The seven ordering rules on real streams, each kept and each broken.

Every scenario holds a stream back so that the order which corrupts KV comes about for certain where
a rule's wait is missing, and returns whether the KV is right all the same. With the wait taken out
it must find the damage, else it proves nothing. The threads that stand in for CUDA streams on a CPU
run the same scenarios.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from services.worker.engine.block_manager import BlockManager
from services.worker.engine.slot_reuse import SlotReuse
from services.worker.engine.streams import Event
from services.worker.engine.transfer import Priority
from tests.support.held_stream import HeldStream
from tests.support.kv_stage import BLOCK, LAYER_GROUPS, KvStage


class Stages:
    """Makes the stages of one test, each on the same kind of device."""

    def __init__(self, device: torch.device) -> None:
        self.made: list[KvStage] = []
        self._device = device

    def make(self, **options: int) -> KvStage:
        self.made.append(KvStage(self._device, **options))
        return self.made[-1]


Scenario = Callable[[Stages], bool]


def rule_1_a_store_waits_for_the_compute_that_wrote_the_block(stages: Stages) -> bool:
    stage = stages.make()
    a = stage.session("a")
    stage.compute.hold()
    assert stage.step(a, BLOCK, write_through=True)
    stage.store.run_ahead()
    stage.compute.let_go()
    stage.evict(a)
    return stage.intact(a)


def rule_2_compute_reads_a_restored_block_only_after_its_load(stages: Stages) -> bool:
    stage = stages.make()
    a = stage.session("a")
    assert stage.step(a, BLOCK)
    stage.evict(a)
    stage.load.hold()
    assert stage.mover.hold(a, Priority.WAKE)
    was_read = stage.read_if_loaded(a)
    stage.compute.run_ahead()
    stage.load.let_go()
    stage.finish()
    return stage.right(a) if was_read else stage.intact(a)


def rule_2_compute_reads_layers_that_are_being_loaded_only_after_them(stages: Stages) -> bool:
    stage = stages.make()
    a = stage.session("a")
    assert stage.step(a, BLOCK)
    stage.evict(a)
    stage.load.hold()
    assert stage.mover.hold(a, Priority.WAKE, layer_groups=LAYER_GROUPS)
    stage.read_behind_load(a)
    stage.compute.run_ahead()
    stage.load.let_go()
    stage.finish()
    return stage.right(a)


def rule_3_a_device_block_is_not_handed_out_while_a_store_reads_it(stages: Stages) -> bool:
    stage = stages.make(device_blocks=1)
    a, b = stage.session("a"), stage.session("b")
    assert stage.step(a, 1)
    stage.mover.evict(a)
    stage.finish()  # the host has its one token
    assert stage.step(a, 2)
    stage.store.hold()
    stage.mover.evict(a)  # the host is to have three
    stage.blocks.truncate(a.kv, 1)  # and needs but the one that it has
    written = stage.step(b, BLOCK)
    stage.compute.run_ahead()
    stage.store.let_go()
    stage.finish()
    assert written or stage.step(b, BLOCK)
    stage.finish()
    stage.mover.forget(b)
    return stage.intact(a)


def rule_4_a_device_block_is_not_handed_out_while_a_load_writes_it(stages: Stages) -> bool:
    stage = stages.make(device_blocks=1)
    a, b = stage.session("a"), stage.session("b")
    assert stage.step(a, BLOCK)
    stage.evict(a)
    stage.load.hold()
    assert stage.mover.hold(a, Priority.WAKE)
    stage.mover.forget(a)  # closed in mid-load
    written = stage.step(b, BLOCK)
    stage.compute.run_ahead()
    stage.load.let_go()
    stage.finish()
    assert written or stage.step(b, BLOCK)
    return stage.intact(b)


def rule_5_a_host_block_is_not_handed_out_while_a_load_reads_it(stages: Stages) -> bool:
    stage = stages.make(device_blocks=2, host_blocks=1)
    a, b = stage.session("a"), stage.session("b")
    assert stage.step(a, BLOCK)
    stage.evict(a)
    assert stage.step(b, BLOCK)
    stage.finish()
    stage.load.hold()
    assert stage.mover.hold(a, Priority.WAKE)
    stage.mover.evict(b)  # wants the one host block, whose content the device is to have soon
    stage.store.run_ahead()
    stage.load.let_go()
    return stage.intact(a)


def rule_6_a_host_block_is_not_handed_out_while_a_store_writes_it(stages: Stages) -> bool:
    stage = stages.make(host_blocks=2, ahead_bytes=1)
    x, a, b = stage.session("x"), stage.session("a"), stage.session("b")
    for session in (x, a, b):
        assert stage.step(session, BLOCK)
    stage.finish()
    fence = stage.compute.record()
    stage.store.hold()
    stage.mover.write_through(x.kv.blocks, fence)  # all that the store stream is given at once
    stage.mover.write_through(a.kv.blocks, fence)
    stage.mover.forget(a)  # closed before its store
    stage.mover.evict(b)  # more urgent than what waits for the store stream
    stage.store.let_go()
    stage.evict(b)
    return stage.intact(b)


def rule_7_a_load_writes_a_device_block_only_after_the_last_step_that_touches_it(
    stages: Stages,
) -> bool:
    stage = stages.make(device_blocks=1)
    a, b = stage.session("a"), stage.session("b")
    assert stage.step(a, BLOCK)
    stage.evict(a)
    stage.finish()
    stage.compute.hold()
    assert stage.step(b, BLOCK)
    stage.mover.forget(b)  # closed while its step runs
    assert stage.mover.hold(a, Priority.WAKE)
    stage.load.run_ahead()
    stage.compute.let_go()
    return stage.intact(a)


def _never(_: object) -> bool:
    return False


def _without_waits(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Makes one stream go on without waiting for any event."""

    def take_out(patch: pytest.MonkeyPatch) -> None:
        wait = HeldStream.wait

        def wait_unless(self: HeldStream, event: Event) -> None:
            if self.name != name:
                wait(self, event)

        patch.setattr(HeldStream, "wait", wait_unless)

    return take_out


def _without(
    owner: type, method: str, instead: Callable[[object], bool]
) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(owner, method, staticmethod(instead))


RULES: list[tuple[Scenario, Callable[[pytest.MonkeyPatch], None]]] = [
    (rule_1_a_store_waits_for_the_compute_that_wrote_the_block, _without_waits("store")),
    (
        rule_2_compute_reads_a_restored_block_only_after_its_load,
        _without(BlockManager, "loaded", lambda _: True),
    ),
    (
        rule_2_compute_reads_layers_that_are_being_loaded_only_after_them,
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


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
            ],
        ),
    ]
)
def stages(request: pytest.FixtureRequest) -> Iterator[Stages]:
    stages = Stages(torch.device(request.param))
    yield stages
    for stage in stages.made:
        stage.close()


@pytest.mark.parametrize("scenario", [scenario for scenario, _ in RULES], ids=IDS)
def test_the_rule_holds(scenario: Scenario, stages: Stages) -> None:
    assert scenario(stages)
    for stage in stages.made:
        stage.check_integrity()


@pytest.mark.parametrize(("scenario", "take_out"), RULES, ids=IDS)
def test_without_its_wait_the_damage_is_found(
    scenario: Scenario,
    take_out: Callable[[pytest.MonkeyPatch], None],
    stages: Stages,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    take_out(monkeypatch)
    assert not scenario(stages)
