import math
from collections import deque

import pytest

from services.scheduler.config import SchedulerConfig
from services.scheduler.coordinator import Coordinator, OpenRequest
from services.scheduler.domain import Action, CommandResult, Drop, Evict, Prefetch, Restore
from services.scheduler.simulation.batch_model import ModelRequest
from services.scheduler.simulation.clock import Events
from services.scheduler.simulation.parameters import Latencies
from services.scheduler.simulation.worker_model import WorkerModel
from tests.support.simulated import BLOCK_TOKENS, worker_parameters


class Rig:
    """One modelled worker without message latencies, and a scheduler that leaves it alone."""

    def __init__(self, device: int = 100, host: int = 100, **changes) -> None:
        self.events = Events(0.0)
        config = SchedulerConfig(policy="reactive-lru")
        self.coordinator = Coordinator(config, 0.0, epoch="e")
        parameters = worker_parameters(device, host, latencies=Latencies(), **changes)
        self.worker = WorkerModel(self.events, self.coordinator, parameters, "w", lambda: None)
        self.done: list[ModelRequest] = []
        self.results: deque[CommandResult] = deque()

    def open(self, *names: str) -> None:
        for name in names:
            self.coordinator.open_session(OpenRequest(name), self.events.now_s)
        self.settle()

    def generate(self, name: str, append: int, new: int = 5) -> ModelRequest:
        return self.worker.submit(name, append, new, self.done.append)

    def command(self, name: str, action: Action) -> None:
        self.coordinator.command(name, action, self.results.append, self.events.now_s)

    def held(self) -> set[str]:
        return {name for name, session in self.worker.sessions.items() if session.kv.held}

    def settle(self) -> None:
        self.events.run(math.inf)
        self.worker.check_integrity()


def test_a_prompt_is_prefilled_in_chunks_and_then_decoded():
    rig = Rig(max_step_tokens=256)
    rig.open("a")
    request = rig.generate("a", 600, 5)
    rig.settle()
    assert rig.done == [request]
    # Three steps of at most 256 tokens, of which the last gives the first token, and four decodes.
    assert request.first_token_s == pytest.approx(0.009 + 0.009 + 0.0067, abs=1e-3)
    assert request.first_token_s is not None
    assert request.end_s - request.first_token_s == pytest.approx(4 * 0.005, abs=1e-3)
    assert sum(count for _, count in request.deltas) == 5
    assert (request.prompt_tokens, request.cached_tokens) == (600, 0)
    session = rig.worker.sessions["a"]
    assert (session.log_tokens, session.kv.tokens) == (605, 604)


def test_a_wake_computes_only_what_is_new_and_the_last_token():
    rig = Rig()
    rig.open("a")
    rig.generate("a", 100, 5)
    rig.settle()
    request = rig.generate("a", 20, 5)
    rig.settle()
    assert (request.prompt_tokens, request.cached_tokens) == (125, 104)
    assert request.recomputed_tokens == 0
    assert rig.worker.counters().prefilled_tokens == 100 + 21


def test_a_request_that_comes_while_others_decode_waits_for_one_step_only():
    rig = Rig()
    rig.open("a", "b")
    rig.generate("a", 50, 400)
    rig.events.run(1.0)
    late = rig.generate("b", 30, 2)
    rig.events.run(1.0 + 0.05)
    assert late.started_s is not None
    assert late.started_s - 1.0 <= 0.006
    rig.settle()
    first = rig.done[-1]
    assert sum(count for _, count in first.deltas) == 400


def test_evict_and_restore_move_the_session_and_answer():
    rig = Rig()
    rig.open("a")
    rig.generate("a", 10 * BLOCK_TOKENS, 1)
    rig.settle()
    rig.command("a", Evict(expected_wake_s=9.0))
    rig.settle()
    evicted = rig.results.popleft()
    assert evicted.ok
    assert evicted.kv is not None
    assert (evicted.kv.resident, evicted.kv.host_blocks) == (False, 10)
    rig.command("a", Restore())
    rig.settle()
    restored = rig.results.popleft()
    assert restored.kv is not None
    assert restored.kv.resident


def test_a_running_session_is_neither_evicted_nor_dropped():
    rig = Rig()
    rig.open("a")
    rig.generate("a", 100, 50)
    for action in (Evict(), Drop()):
        rig.command("a", action)
    rig.settle()
    assert [result.reason for result in rig.results] == ["SESSION_BUSY", "SESSION_BUSY"]
    assert len(rig.done) == 1


def test_a_prefetch_without_room_is_refused_and_a_restore_makes_room():
    rig = Rig(device=20, host=40, low_watermark=0.0)
    rig.open("a", "b")
    for name in ("a", "b"):
        rig.generate(name, 12 * BLOCK_TOKENS - 5, 5)
        rig.settle()
    assert rig.held() == {"b"}
    rig.command("a", Prefetch())
    rig.settle()
    assert rig.results.popleft().reason == "EXHAUSTED"
    rig.command("a", Restore())
    rig.settle()
    assert rig.results.popleft().ok
    assert rig.held() == {"a"}


def test_more_sessions_than_both_pools_hold_are_recomputed_and_none_is_lost():
    rig = Rig(device=30, host=30)
    names = [f"s{number}" for number in range(10)]
    rig.open(*names)
    for _ in range(2):
        for name in names:
            rig.generate(name, 8 * BLOCK_TOKENS, 5)
            rig.settle()
    assert len(rig.done) == 20
    assert sum(request.recomputed_tokens for request in rig.done) > 0
    assert rig.worker.counters().drops > 0


def test_many_at_once_all_get_their_tokens():
    rig = Rig(device=60, host=200, max_running_sequences=4)
    names = [f"s{number}" for number in range(24)]
    rig.open(*names)
    for name in names:
        rig.generate(name, 100, 30)
    rig.settle()
    assert sorted(request.session.session_id for request in rig.done) == sorted(names)
    assert all(sum(n for _, n in request.deltas) == 30 for request in rig.done)


def test_a_report_says_how_full_and_how_fast_it_is():
    rig = Rig()
    rig.open("a")
    rig.generate("a", 100, 5)
    rig.settle()
    rig.worker.report()
    report = rig.coordinator.registry.require("w").report
    assert report is not None
    assert report.device.total == 100
    assert report.device.used == 7
    assert report.host.total == 100
    assert report.mean_step_s == pytest.approx(0.0052, abs=5e-4)
    assert report.counters.generated_tokens == 5
    assert report.prefill_tokens_per_s > 0


def test_what_can_never_fit_is_known():
    rig = Rig(device=10)
    assert rig.worker.fits(10 * BLOCK_TOKENS)
    assert not rig.worker.fits(10 * BLOCK_TOKENS + 1)
    assert not Rig(device=1000).worker.fits(4097)
