from __future__ import annotations

from typing import Any

import pytest

from services.common.errors import (
    DrainingError,
    ExhaustedError,
    InvalidRequestError,
    NoWorkerError,
    SessionClosedError,
    SessionExistsError,
    UnknownSessionError,
    UnknownWorkerError,
    UnsupportedError,
)
from services.common.session_token import SessionToken
from services.scheduler import record
from services.scheduler.config import SchedulerConfig
from services.scheduler.coordinator import Coordinator, OpenRequest
from services.scheduler.domain import Evict, EvictMode, Open, Phase, Restore
from services.scheduler.forecast import Source
from services.scheduler.session import Signal
from tests.support.model_worker import ModelWorker

T0 = 1000.0


def make(**config) -> Coordinator:
    # Nothing is heard from a model worker by itself.
    defaults = {"worker_silence_s": 1e9}
    return Coordinator(SchedulerConfig(**(defaults | config)), T0, epoch="epoch")


@pytest.fixture
def coordinator() -> Coordinator:
    return make()


@pytest.fixture
def worker(coordinator) -> ModelWorker:
    return ModelWorker(coordinator).connect(T0)


def wait(sequence, tool="", expected_s=None) -> Signal:
    return Signal(Phase.IO_WAIT, sequence, tool, expected_s)


def compute(sequence) -> Signal:
    return Signal(Phase.COMPUTE, sequence)


def opened(coordinator, worker, session_id="a", now_s=T0, **request):
    session = coordinator.open_session(OpenRequest(session_id, **request), now_s)
    worker.work(now_s)
    return session


# --- opening ---


def test_a_session_is_opened_on_a_worker(coordinator, worker):
    session = coordinator.open_session(OpenRequest("a", tenant_id="acme", priority=3), T0)
    assert session.worker_id == "w0"
    assert not session.known
    (command,) = worker.received
    assert command.action == Open("acme", 3)
    told = record.decode(command.record or b"")
    assert told is not None
    assert told.tenant_id == "acme"
    worker.work(T0)
    assert session.known
    assert coordinator.dispatcher.endpoint(session) == "w0:1"


def test_without_an_id_one_is_made(coordinator, worker):
    first = coordinator.open_session(OpenRequest(), T0)
    second = coordinator.open_session(OpenRequest(), T0)
    assert first.session_id != second.session_id


def test_opening_again_returns_the_same(coordinator, worker):
    first = opened(coordinator, worker, tenant_id="acme")
    assert coordinator.open_session(OpenRequest("a", tenant_id="acme"), T0 + 1) is first
    assert worker.log == ["open"]
    with pytest.raises(SessionExistsError, match="another tenant"):
        coordinator.open_session(OpenRequest("a", tenant_id="other"), T0 + 1)


def test_a_closed_id_is_not_opened_again_while_remembered(coordinator, worker):
    opened(coordinator, worker)
    coordinator.close_session("a", T0 + 1)
    with pytest.raises(SessionClosedError):
        coordinator.open_session(OpenRequest("a"), T0 + 2)
    coordinator.advance(T0 + 1 + coordinator.config.closed_session_ttl_s)
    assert coordinator.open_session(OpenRequest("a"), T0 + 700).phase is Phase.OPEN


def test_without_a_worker_none_is_opened_and_nothing_remembered(coordinator):
    with pytest.raises(NoWorkerError):
        coordinator.open_session(OpenRequest("a"), T0)
    assert len(coordinator.store) == 0


def test_a_model_that_nobody_serves_is_refused_unless_its_worker_may_come_back(coordinator, worker):
    with pytest.raises(UnsupportedError, match="'huge'; those connected serve tiny"):
        coordinator.open_session(OpenRequest("a", model="huge"), T0)
    assert len(coordinator.store) == 0
    worker.lose(T0)
    with pytest.raises(NoWorkerError):
        coordinator.open_session(OpenRequest("a", model="tiny"), T0)


def test_the_limit_holds_for_new_sessions_alone():
    coordinator = make(max_sessions=1)
    worker = ModelWorker(coordinator).connect(T0)
    first = opened(coordinator, worker)
    with pytest.raises(ExhaustedError, match="limit is 1"):
        coordinator.open_session(OpenRequest("b"), T0)
    assert coordinator.open_session(OpenRequest("a"), T0) is first
    coordinator.close_session("a", T0)
    assert coordinator.open_session(OpenRequest("b"), T0).session_id == "b"


def test_a_draining_scheduler_opens_nothing_new(coordinator, worker):
    first = opened(coordinator, worker)
    coordinator.draining = True
    with pytest.raises(DrainingError):
        coordinator.open_session(OpenRequest("b"), T0)
    assert coordinator.open_session(OpenRequest("a"), T0) is first
    assert coordinator.signal("a", compute(1), T0).transition.applied


def test_sessions_spread_before_the_first_report(coordinator):
    workers = [ModelWorker(coordinator, f"w{i}").connect(T0) for i in range(3)]
    for number in range(9):
        coordinator.open_session(OpenRequest(f"s{number}"), T0)
    assert [len(worker.received) for worker in workers] == [3, 3, 3]


# --- signalling ---


def test_a_tool_call_evicts_and_its_end_restores(coordinator, worker):
    opened(coordinator, worker)
    worker.generate("a", T0 + 1)
    outcome = coordinator.signal("a", wait(1, "search", 12.0), T0 + 2, traceparent="00-x")
    evict = worker.received[-1]
    assert evict.action == Evict(EvictMode.LAZY, T0 + 14)
    assert evict.expected_generation == worker.sessions["a"].generation
    assert evict.traceparent == "00-x"
    assert evict.deadline_s == T0 + 12
    assert worker.causes[-1] == T0 + 2
    told = record.decode(evict.record or b"")
    assert told is not None
    assert (told.phase, told.sequence, told.tool_name) == (Phase.IO_WAIT, 1, "search")
    assert outcome.forecast.source is Source.HINT
    worker.work(T0 + 3)
    assert not outcome.session.kv.resident
    coordinator.signal("a", compute(2), T0 + 14)
    restore = worker.received[-1]
    assert restore.action == Restore()
    assert restore.expected_generation is None
    worker.work(T0 + 14)
    assert outcome.session.kv.resident
    assert len(coordinator.reconciler) == 0


def test_the_predictor_learns_from_the_calls(coordinator, worker):
    opened(coordinator, worker)
    worker.generate("a", T0)
    now_s, sequence = T0, 0
    for _ in range(5):
        coordinator.signal("a", wait(sequence + 1, "search"), now_s)
        coordinator.signal("a", compute(sequence + 2), now_s + 7.0)
        now_s, sequence = now_s + 10.0, sequence + 2
    outcome = coordinator.signal("a", wait(sequence + 1, "search"), now_s)
    assert outcome.forecast.source is Source.TOOL
    assert outcome.session.expected_wake_s == pytest.approx(now_s + 7.0, rel=1e-3)
    assert worker.received[-1].action.expected_wake_s == outcome.session.expected_wake_s


def test_late_and_repeated_signals_command_nothing(coordinator, worker):
    opened(coordinator, worker)
    worker.generate("a", T0)
    coordinator.signal("a", wait(1), T0 + 1)
    coordinator.signal("a", compute(2), T0 + 2)
    before = list(worker.log)
    for signal in (wait(1), compute(2), wait(2)):
        outcome = coordinator.signal("a", signal, T0 + 3)
        assert not outcome.transition.applied
        assert outcome.decision is None
        assert outcome.session.phase is Phase.COMPUTE
        assert outcome.endpoint == "w0:1"
    assert worker.log == before


def test_a_wake_during_an_eviction_restores_at_once(coordinator, worker):
    opened(coordinator, worker)
    worker.generate("a", T0)
    coordinator.signal("a", wait(1), T0 + 1)
    outcome = coordinator.signal("a", compute(2), T0 + 1.1)
    assert worker.log == ["open", "evict", "restore"]
    worker.work(T0 + 2)
    assert outcome.session.kv.resident
    assert worker.log == ["open", "evict", "restore"]
    assert len(coordinator.reconciler) == 0


def test_an_eviction_waits_for_the_end_of_a_generate_and_keeps_its_trace(coordinator, worker):
    opened(coordinator, worker)
    worker.start_generate("a", T0)
    coordinator.signal("a", wait(1), T0 + 1, traceparent="00-tool")
    assert worker.log == ["open"]
    worker.finish_generate("a", T0 + 2)
    assert worker.log == ["open", "evict"]
    assert worker.received[-1].traceparent == "00-tool"
    worker.work(T0 + 2)
    worker.start_generate("a", T0 + 3)
    worker.finish_generate("a", T0 + 4)
    assert worker.received[-1].traceparent == ""


def test_a_wake_before_the_put_off_eviction_cancels_it(coordinator, worker):
    opened(coordinator, worker)
    worker.start_generate("a", T0)
    coordinator.signal("a", wait(1), T0 + 1)
    coordinator.signal("a", compute(2), T0 + 1.5)
    worker.finish_generate("a", T0 + 2)
    assert worker.log == ["open"]


def test_an_unknown_session_comes_back_by_its_token(coordinator, worker):
    token = SessionToken("a", "acme", "acme", 5, "researcher", "w0", int(900e9)).encode()
    with pytest.raises(UnknownSessionError):
        coordinator.signal("a", compute(7), T0)
    outcome = coordinator.signal("a", compute(7), T0, token=token)
    session = outcome.session
    assert (session.tenant_id, session.name, session.priority) == ("acme", "researcher", 5)
    assert session.opened_s == 900.0
    assert outcome.endpoint == "w0:1"
    assert worker.log == ["open"]
    assert worker.state().sessions == {"a"}


def test_a_token_must_be_the_sessions_own(coordinator, worker):
    token = SessionToken("b").encode()
    with pytest.raises(InvalidRequestError, match=r"session_token.*'b', not 'a'"):
        coordinator.signal("a", compute(1), T0, token=token)
    with pytest.raises(InvalidRequestError, match="session_token"):
        coordinator.signal("a", compute(1), T0, token=b"junk")
    assert len(coordinator.store) == 0


def test_the_token_of_a_session_makes_the_same_session(coordinator, worker):
    session = opened(coordinator, worker, tenant_id="acme", name="n", priority=-4)
    other = make()
    ModelWorker(other).connect(T0)
    outcome = other.signal("a", compute(1), T0 + 1, token=coordinator.token(session))
    for field in ("tenant_id", "name", "priority", "cache_salt", "worker_id", "opened_s"):
        assert getattr(outcome.session, field) == getattr(session, field), field


def test_the_reactive_policy_takes_signals_and_commands_nothing():
    coordinator = make(policy="reactive-lru")
    worker = ModelWorker(coordinator).connect(T0)
    opened(coordinator, worker)
    worker.generate("a", T0)
    outcome = coordinator.signal("a", wait(1), T0 + 1)
    assert outcome.transition.applied
    assert outcome.session.phase is Phase.IO_WAIT
    assert outcome.decision is None
    coordinator.signal("a", compute(2), T0 + 2)
    coordinator.advance(T0 + 100)
    assert worker.log == ["open"]


def test_a_wake_said_twice_is_not_taken_for_idle(coordinator, worker):
    opened(coordinator, worker)
    worker.generate("a", T0)
    coordinator.signal("a", compute(1), T0 + 1)
    worker.work(T0 + 1)
    coordinator.signal("a", compute(2), T0 + 500)
    coordinator.advance(T0 + 501)
    worker.work(T0 + 501)
    assert worker.log == ["open", "restore", "restore"]


# --- closing ---


def test_closing_ends_the_session_everywhere(coordinator, worker):
    opened(coordinator, worker)
    worker.generate("a", T0)
    coordinator.close_session("a", T0 + 1)
    coordinator.close_session("a", T0 + 2)
    worker.work(T0 + 2)
    assert worker.log == ["open", "close"]
    assert not worker.sessions
    assert not worker.state().sessions
    with pytest.raises(SessionClosedError):
        coordinator.signal("a", compute(1), T0 + 3)
    with pytest.raises(UnknownSessionError):
        coordinator.get_session("a", T0 + 3)
    token = SessionToken("a").encode()
    with pytest.raises(SessionClosedError):
        coordinator.signal("a", compute(1), T0 + 3, token=token)


def test_a_session_closed_unknown_is_closed_when_its_worker_comes(coordinator):
    coordinator.close_session("a", T0)
    worker = ModelWorker(coordinator)
    worker.start_generate("a", T0)
    worker.connect(T0 + 1)
    worker.work(T0 + 1)
    assert worker.log == ["close"]
    assert not worker.sessions


# --- silent clients ---


def test_a_silent_session_is_evicted_once_idle(coordinator, worker):
    session = opened(coordinator, worker)
    worker.generate("a", T0 + 5)
    due_s = T0 + 5 + coordinator.config.idle_threshold_s
    coordinator.advance(due_s - 0.01)
    assert worker.log == ["open"]
    coordinator.advance(due_s)
    assert worker.log == ["open", "evict"]
    worker.work(due_s)
    assert not session.kv.resident
    coordinator.advance(due_s + 100)
    assert worker.log == ["open", "evict"]
    worker.generate("a", due_s + 100)
    coordinator.advance(due_s + 200)
    assert worker.log == ["open", "evict", "evict"]


def test_the_next_thing_due_is_known(coordinator, worker):
    tick_s = coordinator.next_due_s()
    assert tick_s == T0 + coordinator.config.tick_interval_s
    opened(coordinator, worker)
    worker.generate("a", T0 - 0.5)
    assert coordinator.next_due_s() == T0 + coordinator.config.idle_threshold_s
    worker.generate("a", T0 - 0.75 + 0.5)
    coordinator.advance(tick_s)
    assert coordinator.next_due_s() > tick_s


# --- commands of operators ---


def test_an_operators_command_overrules_and_tells_its_end(coordinator, worker):
    opened(coordinator, worker)
    worker.generate("a", T0)
    heard: list[Any] = []
    coordinator.command("a", Evict(EvictMode.SCRUB), heard.append, T0 + 1, traceparent="00-op")
    command = worker.received[-1]
    assert command.action == Evict(EvictMode.SCRUB)
    assert command.expected_generation is None
    assert command.traceparent == "00-op"
    assert not heard
    worker.work(T0 + 1)
    assert [result.ok for result in heard] == [True]


def test_an_operators_command_needs_a_session_and_its_worker(coordinator, worker):
    with pytest.raises(UnknownSessionError):
        coordinator.command("a", Restore(), lambda result: None, T0)
    opened(coordinator, worker)
    worker.lose(T0 + 1)
    with pytest.raises(NoWorkerError):
        coordinator.command("a", Restore(), lambda result: None, T0 + 1)


def test_a_drained_worker_gets_no_new_sessions(coordinator, worker):
    opened(coordinator, worker)
    assert coordinator.drain_worker("w0", True).draining
    with pytest.raises(NoWorkerError, match="draining"):
        coordinator.open_session(OpenRequest("b"), T0)
    assert coordinator.get_session("a", T0).worker_id == "w0"
    coordinator.drain_worker("w0", False)
    assert coordinator.open_session(OpenRequest("b"), T0).worker_id == "w0"
    with pytest.raises(UnknownWorkerError):
        coordinator.drain_worker("w9", True)


# --- time ---


def test_an_unanswered_command_is_sent_again_under_its_id_and_then_given_up():
    coordinator = make(policy="reactive-lru")
    worker = ModelWorker(coordinator).connect(T0)
    opened(coordinator, worker)
    worker.generate("a", T0)
    heard: list[Any] = []
    coordinator.command("a", Restore(), heard.append, T0)
    timeout_s = coordinator.config.command_timeout_s
    for attempt in range(1, 3):
        coordinator.advance(T0 + attempt * timeout_s)
    sent = [command for command in worker.received if command.action == Restore()]
    assert len(sent) == 3
    assert len({command.command_id for command in sent}) == 1
    assert [command.deadline_s for command in sent] == [
        T0 + timeout_s,
        T0 + 2 * timeout_s,
        T0 + 3 * timeout_s,
    ]
    assert not heard
    coordinator.advance(T0 + 3 * timeout_s)
    assert [result.reason for result in heard] == ["COMMAND_TIMEOUT"]
    assert len(coordinator.reconciler) == 0


def test_a_silent_worker_is_taken_for_lost():
    coordinator = make(worker_silence_s=30.0)
    worker = ModelWorker(coordinator).connect(T0)
    session = opened(coordinator, worker)
    silence_s = coordinator.config.worker_silence_s
    coordinator.workers.heard(worker.state(), T0 + 10)
    coordinator.advance(T0 + 10 + silence_s)
    assert worker.state().link is worker
    worker.connected = False
    coordinator.advance(T0 + 11 + silence_s)
    assert worker.closed is not None
    assert "nothing was heard" in worker.closed
    assert coordinator.dispatcher.endpoint(session) == ""


def test_a_late_tick_comes_once(coordinator):
    coordinator.advance(T0 + 500)
    assert coordinator.next_due_s() == T0 + 500 + coordinator.config.tick_interval_s


# --- clients that do not come back ---


def test_a_session_of_a_client_that_crashed_is_closed_everywhere():
    coordinator = make(session_ttl_s=60.0)
    worker = ModelWorker(coordinator).connect(T0)
    opened(coordinator, worker, "crashed")
    opened(coordinator, worker, "alive")
    coordinator.signal("alive", compute(1), T0 + 50)
    worker.work(T0 + 50)
    coordinator.advance(T0 + 61)
    worker.work(T0 + 61)
    assert [session.session_id for session in coordinator.store] == ["alive"]
    assert set(worker.sessions) == {"alive"}
    assert coordinator.store.expired == 1
    with pytest.raises(SessionClosedError, match="EXPIRED: nothing was heard of it for 60 s"):
        coordinator.signal("crashed", compute(1), T0 + 62)
    with pytest.raises(SessionClosedError, match="EXPIRED"):
        coordinator.open_session(OpenRequest("crashed"), T0 + 62)
