"""The modes that a scheduler tells: what is stored, forgotten and shared, and what stays right."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import product

import pytest

from services.worker.messages import (
    Counters,
    Evict,
    EvictMode,
    Mode,
    SessionEvent,
    SessionEventKind,
    SetMode,
)
from tests.support.engine_harness import BLOCK, continuation
from tests.support.hand_driven import HandDriven

PROMPT = list(range(10, 10 + 2 * BLOCK + 1))
FORGET = Mode(write_through=False, offload=False)


class Stage(HandDriven):
    """A hand-driven engine that is told modes."""

    def tell(self, **narrowed: bool) -> None:
        """Has the engine serve in a mode."""
        self.engine.handle(SetMode(Mode(**narrowed)))

    def serve(self, session_id: str, append: Sequence[int], count: int = 3) -> list[int]:
        """Runs one request to its end and returns its tokens."""
        request = self.submit(session_id, append, max_tokens=count)
        self.finish()
        tokens = self.generation(request).tokens
        assert tokens is not None
        return tokens

    def evict(self, session_id: str, mode: EvictMode = EvictMode.LAZY) -> None:
        """Has a session evicted, stores and all."""
        command = self.command(session_id, Evict(mode))
        self.finish()
        done = self.done(command)
        assert done is not None
        assert done.error is None

    @property
    def counters(self) -> Counters:
        """What the engine has done so far."""
        return self.engine.report().counters

    def events(self, kind: SessionEventKind) -> list[str]:
        """Returns the sessions that the engine told of."""
        return [
            message.session.session_id
            for message in self.heard
            if isinstance(message, SessionEvent) and message.kind is kind
        ]


@pytest.fixture
def stage() -> Iterator[Stage]:
    stage = Stage()
    yield stage
    stage.close()


def test_without_write_through_blocks_are_stored_at_their_eviction(stage: Stage) -> None:
    stage.tell(write_through=False)
    log = PROMPT + stage.serve("a", PROMPT)
    assert stage.counters.stores == 0
    stage.evict("a", EvictMode.SCRUB)
    assert stage.counters.stores == 1
    assert stage.session("a").kv.blocks[0].host is not None
    assert stage.goes_on_rightly("a", log)
    assert (stage.counters.loads, stage.counters.recomputed_tokens) == (1, 0)


def test_a_mode_does_not_widen_what_the_worker_was_told_at_its_start() -> None:
    stage = Stage(write_through=False)
    stage.tell(write_through=True)
    stage.serve("a", PROMPT)
    assert stage.counters.stores == 0
    stage.close()


def test_without_offload_an_eviction_forgets(stage: Stage) -> None:
    stage.tell(offload=False, share_prefixes=False)
    log = PROMPT + stage.serve("a", PROMPT)
    stage.evict("a")
    assert stage.session("a").kv.blocks == []
    assert stage.goes_on_rightly("a", log)
    counters = stage.counters
    assert (counters.drops, counters.evictions, counters.stores, counters.loads) == (1, 0, 0, 0)
    assert counters.recomputed_tokens == len(log) - 1  # of the last one there never was any KV


def test_without_offload_room_is_made_by_forgetting() -> None:
    stage = Stage(device_blocks=8)
    stage.engine.handle(SetMode(FORGET))
    logs = {name: [ord(name), *PROMPT] for name in "abcd"}  # 4 blocks each, of 8
    for name, log in logs.items():
        log += stage.serve(name, log)
    assert stage.events(SessionEventKind.DROPPED) == ["a", "b"]
    assert stage.events(SessionEventKind.EVICTED) == []
    assert [stage.session(name).kv.held for name in logs] == [False, False, True, True]
    for name, log in logs.items():
        assert stage.goes_on_rightly(name, log)
    counters = stage.counters
    assert counters.drops == len(stage.events(SessionEventKind.DROPPED))
    assert (counters.evictions, counters.stores, counters.loads) == (0, 0, 0)
    assert counters.recomputed_tokens > 0
    stage.close()


@pytest.mark.parametrize("share_prefixes", [True, False])
def test_without_offload_the_preempted_are_computed_again(share_prefixes: bool) -> None:
    stage = Stage(device_blocks=6)
    stage.tell(write_through=False, offload=False, share_prefixes=share_prefixes)
    requests = {name: stage.submit(name, [ord(name)], max_tokens=18) for name in "ab"}  # 5 blocks
    stage.finish()
    for name, request in requests.items():
        assert stage.generation(request).tokens == continuation([ord(name)], 18)
    counters = stage.counters
    assert counters.preemptions > 0
    assert counters.drops == counters.preemptions + len(stage.events(SessionEventKind.DROPPED))
    assert (counters.stores, counters.loads) == (0, 0)
    stage.close()


def test_without_offload_nobody_is_forgotten_ahead_of_need() -> None:
    stage = Stage(device_blocks=8, low_watermark=0.9)
    stage.engine.handle(SetMode(FORGET))
    stage.serve("a", PROMPT)
    stage.turn()
    assert stage.session("a").kv.held
    assert stage.counters.drops == 0
    stage.close()


def test_what_is_forgotten_is_reused_from_its_end() -> None:
    stage = Stage(device_blocks=6)
    stage.engine.handle(SetMode(FORGET))
    log = PROMPT + stage.serve("a", PROMPT)  # 3 blocks, the first 2 full
    stage.evict("a")
    stage.serve("b", range(500, 500 + 4 * BLOCK), 2)  # 5 blocks: one of a's is left
    request = stage.submit("a", [3], max_tokens=3)
    stage.finish()
    started = stage.generation(request).started
    assert started is not None
    assert started.kv.prefix_hit_tokens == BLOCK
    assert stage.generation(request).tokens == continuation([*log, 3], 3)
    stage.close()


def test_copies_from_before_serve_one_more_wake(stage: Stage) -> None:
    log = PROMPT + stage.serve("a", PROMPT)
    stage.evict("a", EvictMode.SCRUB)
    stores = stage.counters.stores
    stage.engine.handle(SetMode(FORGET))
    log += [1, *stage.serve("a", [1])]
    assert (stage.counters.loads, stage.counters.recomputed_tokens) == (1, 0)
    stage.evict("a")
    host = stage.engine.report().host
    assert host.free == host.total
    assert stage.goes_on_rightly("a", log)
    assert (stage.counters.loads, stage.counters.stores) == (1, stores)


def test_who_waits_for_host_room_is_dropped_when_there_is_to_be_none() -> None:
    stage = Stage(host_blocks=1)
    log = PROMPT + stage.serve("a", PROMPT)
    stage.evict("a")
    stores = stage.counters.stores
    stage.engine.handle(SetMode(FORGET))
    stage.turn()
    assert stage.events(SessionEventKind.DROPPED) == ["a"]
    stage.blocks.grow_host(1)
    stage.engine.grow_host(8)
    stage.finish()
    assert stage.counters.stores == stores
    assert stage.goes_on_rightly("a", log)
    stage.close()


def test_stores_under_way_end_and_no_more_begin(stage: Stage) -> None:
    request = stage.submit("a", PROMPT, max_tokens=3)
    while not stage.ended(request):
        stage.step()  # the store stream stands still
    assert stage.engine.report().stores_in_flight > 0
    stage.engine.handle(SetMode(FORGET))
    command = stage.command("a", Evict())
    stage.turn()
    assert stage.done(command) is not None
    stage.finish()
    tokens = stage.generation(request).tokens
    assert tokens is not None
    stores = stage.counters.stores
    assert stage.goes_on_rightly("a", PROMPT + tokens)
    assert stage.counters.stores == stores


def test_without_sharing_nothing_is_looked_up_and_nothing_published(stage: Stage) -> None:
    other = PROMPT[::-1]
    stage.serve("published", PROMPT)
    stage.tell(share_prefixes=False)
    assert stage.serve("a", PROMPT) == continuation(PROMPT, 3)
    stage.serve("unpublished", other)
    assert stage.counters.prefix_hit_tokens == 0
    stage.tell()
    assert stage.serve("b", other) == continuation(other, 3)
    assert stage.counters.prefix_hit_tokens == 0
    assert stage.serve("c", PROMPT) == continuation(PROMPT, 3)
    assert stage.counters.prefix_hit_tokens == 2 * BLOCK


def test_what_is_shared_already_stays_shared(stage: Stage) -> None:
    logs = {name: PROMPT + stage.serve(name, PROMPT) for name in "ab"}
    stage.tell(offload=False, share_prefixes=False)
    assert stage.session("a").kv.blocks[0] is stage.session("b").kv.blocks[0]
    stage.evict("a")
    for name, log in logs.items():
        assert stage.goes_on_rightly(name, log)


MODES = [Mode(*flags) for flags in product((True, False), repeat=3)]


@pytest.mark.parametrize("seed", range(12))
def test_whatever_mode_comes_when_the_tokens_stay_right(seed: int) -> None:
    draw = random.Random(seed)
    stage = Stage(device_blocks=10, host_blocks=6, max_context=8 * BLOCK)
    logs: dict[str, list[int]] = {name: [] for name in "abcd"}
    for _ in range(6):
        requests = {}
        for name, log in logs.items():
            log += [draw.randrange(9)] * draw.randrange(1, 4)
            append = log[len(stage.session(name).tokens) if name in stage.engine.sessions else 0 :]
            requests[name] = stage.submit(name, append, max_tokens=2)
        while not all(stage.ended(request) for request in requests.values()):
            stage.engine.handle(SetMode(draw.choice(MODES)))
            for stream in ("load", "store", "compute"):
                stage.stream(stream).run(draw.randrange(3))
            stage.turn()
        for name, log in logs.items():
            tokens = stage.generation(requests[name]).tokens
            assert tokens == continuation(log, 2)
            log += tokens
            stage.command(name, Evict(draw.choice(list(EvictMode))))
    stage.finish()
    stage.close()
