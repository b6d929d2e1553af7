"""What the scheduler does when a worker's pools are short: all of it together, in virtual time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from services.common.errors import ExhaustedError
from services.scheduler.config import SchedulerConfig
from services.scheduler.coordinator import Coordinator, OpenRequest
from services.scheduler.domain import (
    Counters,
    Drop,
    Evict,
    Phase,
    PoolState,
    Prefetch,
    Report,
    SetHint,
)
from services.scheduler.policy.options import PolicyOptions
from services.scheduler.session import Signal
from tests.support.model_worker import BLOCKS, ModelWorker

T0 = 1000.0
TOOL_S = 20.0


class Agents:
    """Agents of one worker that cycle through tool calls of a known length."""

    def __init__(self, **config) -> None:
        defaults = {"worker_silence_s": 1e9, "session_ttl_s": 0.0}
        self.coordinator = Coordinator(SchedulerConfig(**(defaults | config)), T0, epoch="epoch")
        self.worker = ModelWorker(self.coordinator).connect(T0)
        self.sequences: dict[str, int] = {}

    def open(self, name: str, now_s: float) -> None:
        self.coordinator.open_session(OpenRequest(name), now_s)
        self.worker.work(now_s)
        self.worker.generate(name, now_s)
        self.sequences[name] = 0

    def signal(self, name: str, phase: Phase, now_s: float) -> None:
        self.sequences[name] += 1
        self.coordinator.signal(name, Signal(phase, self.sequences[name], "search"), now_s)
        self.worker.work(now_s)

    def cycle(self, name: str, now_s: float, tool_s: float = TOOL_S) -> float:
        self.signal(name, Phase.IO_WAIT, now_s)
        self.signal(name, Phase.COMPUTE, now_s + tool_s)
        self.worker.generate(name, now_s + tool_s)
        return now_s + tool_s

    def report(self, now_s: float, free=0, reclaimable=0, host_free=100, **counters) -> None:
        state = self.worker.state()
        state.heard_s = now_s
        used = 100 - free - reclaimable
        self.coordinator.workers.reported(
            state,
            Report(
                device=PoolState(100, free, used, reclaimable),
                host=PoolState(400, host_free, 400 - host_free),
                counters=Counters(**counters),
                load_bytes_per_s=1e9,
                prefill_tokens_per_s=1e3,
            ),
        )

    def run(self, until_s: float) -> None:
        while (due_s := self.coordinator.next_due_s()) <= until_s:
            self.coordinator.advance(due_s)

    def sent(self, kind) -> list[str]:
        return [c.session_id for c in self.worker.received if isinstance(c.action, kind)]


@pytest.fixture
def agents() -> Agents:
    made = Agents()
    made.open("teacher", T0)
    now_s = T0
    for _ in range(6):
        now_s = made.cycle("teacher", now_s)
    for name in ("a", "b", "c"):
        made.open(name, now_s)
    return made


NOW = T0 + 6 * TOOL_S


def test_who_may_have_lost_blocks_is_back_before_the_wake(agents):
    agents.report(NOW + 1, free=0, reclaimable=50)
    agents.signal("b", Phase.IO_WAIT, NOW + 2)
    agents.report(NOW + 3, free=0, reclaimable=50)
    agents.run(NOW + 2 + 0.8 * TOOL_S)
    assert agents.sent(Prefetch) == []
    agents.run(NOW + 2 + 0.95 * TOOL_S)
    assert agents.sent(Prefetch) == ["b"]
    agents.worker.work(NOW + 2 + 0.95 * TOOL_S)
    agents.signal("b", Phase.COMPUTE, NOW + 2 + TOOL_S)
    tally = agents.coordinator.dispatcher.whereabouts.prefetches
    assert (tally.sent, tally.hits, tally.wasted, tally.refused) == (1, 1, 0, 0)
    agents.worker.generate("b", NOW + 2 + TOOL_S)
    assert tally.hits == 1


def test_one_that_does_not_wake_is_let_go_again_and_counted(agents):
    agents.report(NOW, free=0, reclaimable=50)
    agents.signal("a", Phase.IO_WAIT, NOW + 1)
    agents.report(NOW + 2, free=0, reclaimable=50)
    for step in range(40):
        agents.run(NOW + 1 + 5 * step)
        agents.worker.work(NOW + 1 + 5 * step)
    tally = agents.coordinator.dispatcher.whereabouts.prefetches
    assert (tally.sent, tally.hits, tally.wasted) == (1, 0, 1)
    assert agents.worker.log[-1] in {"evict", "set_hint"}
    assert not agents.worker.sessions["a"].kv.resident


def test_without_room_they_wait_and_come_nearest_first(agents):
    agents.report(NOW, free=0, reclaimable=0)
    for n, name in enumerate(("a", "b", "c")):
        agents.signal(name, Phase.IO_WAIT, NOW + 1 + n)
    agents.report(NOW + 5, free=0, reclaimable=0)
    agents.run(NOW + 1 + 0.99 * TOOL_S + 2)
    assert agents.sent(Prefetch) == []
    # Room for one and the reserve of five.
    agents.report(NOW + 1 + 0.99 * TOOL_S + 2.5, free=0, reclaimable=BLOCKS + 5)
    assert agents.sent(Prefetch) == ["a"]


def test_a_refused_prefetch_is_tried_again_with_the_next_report(agents):
    agents.report(NOW, free=0, reclaimable=50)
    agents.signal("a", Phase.IO_WAIT, NOW + 1)
    agents.report(NOW + 2, free=0, reclaimable=50)
    due_s = NOW + 1 + 0.95 * TOOL_S
    agents.run(due_s)
    (command,) = (c for c in agents.worker.queue if isinstance(c.action, Prefetch))
    agents.worker.queue.clear()
    agents.worker.answer(command, due_s, code="RESOURCE_EXHAUSTED", reason="EXHAUSTED")
    assert agents.sent(Prefetch) == ["a"]
    agents.report(due_s + 0.1, free=0, reclaimable=50)
    assert agents.sent(Prefetch) == ["a", "a"]
    tally = agents.coordinator.dispatcher.whereabouts.prefetches
    assert (tally.sent, tally.refused) == (2, 1)


def test_with_both_pools_full_the_furthest_is_dropped_to_tokens(agents):
    agents.signal("a", Phase.IO_WAIT, NOW)
    agents.signal("b", Phase.IO_WAIT, NOW + 5)
    agents.report(NOW + 6, free=0, host_free=5)
    assert agents.sent(Drop) == ["b"]
    agents.worker.work(NOW + 6)
    assert agents.worker.sessions["b"].kv.missing_tokens > 0
    # Not again before it is told how full the worker is then.
    assert agents.sent(Drop) == ["b"]


def test_a_wake_without_kv_counts_as_a_prompt(agents):
    agents.signal("a", Phase.IO_WAIT, NOW)
    agents.report(NOW + 1, free=0, host_free=0)
    agents.worker.work(NOW + 1)
    before = agents.worker.state().prompts.tokens
    agents.signal("a", Phase.COMPUTE, NOW + 2)
    assert agents.worker.state().prompts.tokens > before
    agents.worker.generate("a", NOW + 3)
    assert agents.worker.state().prompts.tokens == before


def test_who_never_comes_back_is_expected_ever_later(agents):
    agents.signal("a", Phase.IO_WAIT, NOW)
    for now_s in range(int(NOW), int(NOW) + 3600):
        agents.run(now_s)
        agents.worker.work(now_s)
    told = [
        command.action.expected_wake_s or 0.0
        for command in agents.worker.received
        if isinstance(command.action, SetHint) and command.session_id == "a"
    ]
    assert told == sorted(told)
    assert told[-1] > NOW + 3600
    assert len(told) < 40


def test_a_silent_client_is_expected_by_how_long_it_is_silent():
    agents = Agents()
    agents.open("quiet", T0)
    now_s = T0
    for _ in range(5):
        now_s += 8.0
        agents.worker.generate("quiet", now_s)
    agents.run(now_s + 1.0)
    agents.worker.work(now_s + 1.0)
    evict = agents.worker.received[-1].action
    assert isinstance(evict, Evict)
    assert evict.expected_wake_s == pytest.approx(now_s + 8.0, abs=1.0)


def test_thrashing_stops_admission_and_it_recovers_by_itself():
    agents = Agents()
    agents.open("a", T0)
    for second in range(1, 30):
        agents.report(T0 + second, free=50, recomputed_tokens=900 * second)
    with pytest.raises(ExhaustedError, match="recomputes lost KV") as caught:
        agents.coordinator.open_session(OpenRequest("b"), T0 + 29)
    assert caught.value.metadata["position"] == "1"
    for second in range(30, 36):
        agents.report(T0 + second, free=50, recomputed_tokens=900 * 29)
    assert agents.coordinator.open_session(OpenRequest("b"), T0 + 35).worker_id == "w0"


def test_prompts_let_in_at_once_are_limited_and_go_on_as_they_are_computed():
    agents = Agents(policy_options=PolicyOptions(backlog_s=2.0))
    agents.report(T0, free=100)
    for name in ("a", "b"):
        agents.coordinator.open_session(OpenRequest(name, expected_tokens=1000), T0)
    with pytest.raises(ExhaustedError, match="the workers are busy: 2000 tokens") as caught:
        agents.coordinator.open_session(OpenRequest("c", expected_tokens=1000), T0)
    assert caught.value.retry_after_s == pytest.approx(1.0)
    agents.worker.work(T0)
    agents.worker.start_generate("a", T0 + 0.1)
    agents.report(T0 + 1.1, free=50, prefilled_tokens=1000)
    opened = agents.coordinator.open_session(OpenRequest("c", expected_tokens=1000), T0 + 1.1)
    assert opened.session_id == "c"


def test_prompts_of_unknown_length_are_taken_to_be_as_long_as_those_before():
    agents = Agents(policy_options=PolicyOptions(backlog_s=1.0))
    agents.report(T0, free=100)
    agents.coordinator.open_session(OpenRequest("a"), T0)
    with pytest.raises(ExhaustedError, match="the workers are busy: 512 tokens"):
        agents.coordinator.open_session(OpenRequest("b"), T0)
    agents.worker.work(T0)
    agents.worker.sessions["a"] = replace(agents.worker.sessions["a"], context_length=50)
    agents.worker.start_generate("a", T0 + 0.1)
    for name in "bcdef":
        agents.coordinator.open_session(OpenRequest(name), T0 + 0.2)


def test_an_overload_of_minutes_is_over_soon_after_the_load_drops():
    agents = Agents(policy_options=PolicyOptions(backlog_s=1.0))
    agents.report(T0, free=100)
    opened: dict[str, float] = {}
    waiting: list[tuple[float, str]] = []
    done = 0
    for tenth in range(1, 2400):
        now_s = T0 + tenth / 10
        # Twice what can be computed for a minute, then a tenth of it.
        if (tenth < 600 and tenth % 5 == 0) or tenth % 100 == 0:
            waiting.append((now_s, f"s{tenth}"))
        for due_s, name in list(waiting):
            if due_s > now_s:
                continue
            waiting.remove((due_s, name))
            try:
                agents.coordinator.open_session(OpenRequest(name, expected_tokens=1000), now_s)
            except ExhaustedError as error:
                waiting.append((now_s + (error.retry_after_s or 0.0), name))
                continue
            opened[name] = now_s
            agents.worker.work(now_s)
            agents.worker.start_generate(name, now_s)
        if tenth % 10 == 0:
            started = len(opened) * 1000
            done = min(started, done + 1000)
            agents.report(now_s, free=100, prefilled_tokens=done)
    assert len(agents.coordinator.admission) == 0
    assert not [name for at_s, name in waiting if at_s < T0 + 200]
    assert opened["s2300"] == T0 + 230
