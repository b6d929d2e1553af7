from __future__ import annotations

from typing import Any

import pytest

from services.common.session_token import SessionToken
from services.scheduler import record
from services.scheduler.config import SchedulerConfig
from services.scheduler.coordinator import Coordinator, OpenRequest
from services.scheduler.domain import (
    NO_KV,
    EventKind,
    Evict,
    Open,
    Phase,
    Residency,
    Restore,
    SessionEvent,
    SessionSnapshot,
)
from services.scheduler.session import Session, Signal
from tests.support.model_worker import ModelWorker

T0 = 1000.0
GRACE_S = SchedulerConfig().worker_grace_s


def make() -> Coordinator:
    # Nothing is heard from a model worker by itself.
    return Coordinator(SchedulerConfig(worker_silence_s=1e9), T0)


@pytest.fixture
def coordinator() -> Coordinator:
    return make()


@pytest.fixture
def worker(coordinator) -> ModelWorker:
    return ModelWorker(coordinator).connect(T0)


def wait(sequence) -> Signal:
    return Signal(Phase.IO_WAIT, sequence)


def compute(sequence) -> Signal:
    return Signal(Phase.COMPUTE, sequence)


@pytest.fixture
def session(coordinator, worker) -> Session:
    made = coordinator.open_session(OpenRequest("a"), T0)
    worker.work(T0)
    worker.generate("a", T0)
    return made


def snapshot(record_bytes=b"", **fields) -> SessionSnapshot:
    values = {
        "session_id": "a",
        "generation": 5,
        "context_length": 50,
        "kv": Residency(4, 4, 0, 0, resident=True),
        "generating": False,
        "record": record_bytes,
        "last_generate_s": T0 - 5,
    }
    return SessionSnapshot(**(values | fields))


# --- restart of the scheduler ---


def test_a_new_scheduler_knows_the_sessions_from_the_workers_snapshot(coordinator, worker, session):
    coordinator.signal("a", Signal(Phase.IO_WAIT, 4, "search", 9.0), T0 + 1)
    worker.work(T0 + 1)
    other = make()
    worker.coordinator = other
    worker.connect(T0 + 3)
    revived = other.get_session("a", T0 + 3)
    assert (revived.phase, revived.sequence, revived.tool_name) == (Phase.IO_WAIT, 4, "search")
    assert revived.phase_since_s == T0 + 1
    assert revived.expected_wake_s == T0 + 10
    assert revived.known
    assert revived.generation == session.generation
    assert not revived.kv.resident
    assert worker.state().sessions == {"a"}
    assert other.store.count(Phase.IO_WAIT) == 1
    assert not worker.queue


def test_a_new_scheduler_makes_true_what_the_old_one_left_undone(coordinator, worker, session):
    coordinator.signal("a", wait(1), T0 + 1)
    told = worker.received[-1].record
    worker.queue.clear()
    worker.sessions["a"] = snapshot(told)
    other = make()
    worker.coordinator = other
    worker.received.clear()
    worker.connect(T0 + 2)
    assert worker.log == ["evict"]
    worker.work(T0 + 2)
    assert not other.get_session("a", T0 + 2).kv.resident


def test_a_signal_before_its_worker_is_back_is_not_undone_by_the_snapshot(worker, session):
    token = SessionToken("a", worker_id="w0").encode()
    old = session
    old.apply(wait(3), T0)
    worker.sessions["a"] = snapshot(record.encode(old))
    other = make()
    worker.coordinator = other
    outcome = other.signal("a", compute(4), T0 + 1, token=token, traceparent="00-wake")
    assert outcome.endpoint == ""
    assert outcome.session.worker_id == "w0"
    worker.sessions["a"] = snapshot(
        record.encode(old), kv=Residency(4, 0, 4, 0, resident=False), last_generate_s=T0 - 60
    )
    worker.received.clear()
    worker.connect(T0 + 1.5)
    assert outcome.session.phase is Phase.COMPUTE
    assert outcome.session.sequence == 4
    assert worker.log == ["restore"]
    assert worker.received[-1].traceparent == "00-wake"
    assert worker.state().sessions == {"a"}


def test_a_session_made_from_a_token_is_known_by_it(coordinator, worker):
    token = SessionToken("a", "acme", "salt", 3, "researcher", "w0", int(900e9)).encode()
    worker.start_generate("a", T0, record=token)
    session = coordinator.get_session("a", T0)
    assert (session.tenant_id, session.cache_salt, session.opened_s) == ("acme", "salt", 900.0)
    assert session.generating
    assert session.known


def test_a_session_without_a_readable_record_is_kept_all_the_same(coordinator, worker):
    worker.generate("a", T0, record=b"\xff junk")
    session = coordinator.get_session("a", T0)
    assert (session.phase, session.tenant_id) == (Phase.OPEN, "")
    assert session.context_length == 50


# --- a worker is lost, and comes back ---


def test_the_same_process_back_is_taken_up_where_it_was(coordinator, worker, session):
    worker.lose(T0 + 1)
    assert coordinator.dispatcher.endpoint(session) == ""
    outcome = coordinator.signal("a", wait(1), T0 + 1.5)
    assert outcome.endpoint == ""
    worker.received.clear()
    worker.connect(T0 + 60)
    assert worker.log == ["evict"]
    assert session.known
    assert session.generation == worker.sessions["a"].generation


def test_a_command_not_answered_before_the_loss_is_sent_again(coordinator, worker, session):
    coordinator.signal("a", wait(1), T0 + 1)
    sent = worker.received[-1]
    worker.lose(T0 + 2)
    worker.connect(T0 + 3)
    again = worker.received[-1]
    assert again.command_id == sent.command_id
    assert again.deadline_s > sent.deadline_s
    assert worker.log.count("evict") == 2
    worker.work(T0 + 3)
    assert not session.kv.resident


def test_a_superseded_command_is_not_sent_again(coordinator, worker, session):
    coordinator.signal("a", wait(1), T0 + 1)
    coordinator.signal("a", compute(2), T0 + 1)
    worker.lose(T0 + 2)
    worker.received.clear()
    worker.connect(T0 + 3)
    assert worker.log == ["restore"]
    worker.work(T0 + 3)
    assert len(coordinator.reconciler) == 0


def test_a_new_process_of_the_worker_gets_its_sessions_at_their_next_signal(
    coordinator, worker, session
):
    worker.lose(T0 + 1)
    worker.restart()
    worker.received.clear()
    worker.connect(T0 + 30)
    assert worker.log == []
    assert not session.known
    assert (session.generation, session.kv, session.context_length) == (0, NO_KV, 0)
    outcome = coordinator.signal("a", compute(1), T0 + 31)
    assert outcome.endpoint == "w0:1"
    assert worker.log == ["open"]
    coordinator.signal("a", wait(2), T0 + 31)
    assert worker.log == ["open"]
    worker.work(T0 + 31)
    assert session.known


def test_a_new_process_fails_what_the_old_one_was_asked(coordinator, worker, session):
    heard: list[Any] = []
    coordinator.command("a", Restore(), heard.append, T0 + 1)
    worker.lose(T0 + 2)
    worker.restart()
    worker.received.clear()
    worker.connect(T0 + 3)
    assert [result.reason for result in heard] == ["UNAVAILABLE"]
    assert worker.log == []
    assert session.move_id == ""
    assert len(coordinator.reconciler) == 0


def test_another_worker_takes_a_session_after_the_grace(coordinator, worker, session):
    other = ModelWorker(coordinator, "w1").connect(T0)
    worker.lose(T0 + 10)
    outcome = coordinator.signal("a", wait(1), T0 + 10 + GRACE_S / 2)
    assert outcome.endpoint == ""
    assert session.worker_id == "w0"
    outcome = coordinator.signal("a", compute(2), T0 + 10 + GRACE_S)
    assert outcome.endpoint == "w1:1"
    assert other.log == ["open"]
    assert other.state().sessions == {"a"}
    other.work(T0 + 20)
    other.generate("a", T0 + 20)
    worker.received.clear()
    worker.connect(T0 + 30)
    assert worker.log == ["close"]
    assert session.worker_id == "w1"
    assert worker.state().sessions == set()


def test_getting_or_opening_a_session_places_it_anew_too(coordinator, worker, session):
    ModelWorker(coordinator, "w1").connect(T0)
    worker.lose(T0 + 10)
    late_s = T0 + 10 + GRACE_S
    assert coordinator.get_session("a", late_s).worker_id == "w1"
    coordinator.open_session(OpenRequest("b"), late_s)
    assert coordinator.open_session(OpenRequest("a"), late_s) is session


def test_the_first_worker_back_keeps_what_the_second_never_got(coordinator, worker, session):
    other = ModelWorker(coordinator, "w1").connect(T0)
    worker.lose(T0 + 10)
    coordinator.signal("a", compute(1), T0 + 20)
    assert session.worker_id == "w1"
    other.queue.clear()
    worker.connect(T0 + 21)
    assert session.worker_id == "w0"
    assert session.context_length == 50
    assert other.log == ["open", "close"]


def test_a_session_opened_anew_elsewhere_goes_back_to_its_context(coordinator, worker, session):
    worker.lose(T0)
    other_scheduler = make()
    worker.coordinator = other_scheduler
    second = ModelWorker(other_scheduler, "w1").connect(T0 + 1)
    anew = other_scheduler.open_session(OpenRequest("a"), T0 + 1)
    second.work(T0 + 1)
    assert anew.known
    assert anew.worker_id == "w1"
    worker.connect(T0 + 2)
    assert anew.worker_id == "w0"
    assert anew.context_length == 50
    assert second.log == ["open", "close"]


def test_where_the_client_generates_is_where_the_session_is(coordinator, worker, session):
    other = ModelWorker(coordinator, "w1").connect(T0)
    worker.received.clear()
    other.generate("a", T0 + 1)
    assert session.worker_id == "w1"
    assert session.generation == other.sessions["a"].generation
    assert worker.log == ["close"]
    assert worker.state().sessions == set()
    assert other.state().sessions == {"a"}


def test_an_event_of_a_copy_elsewhere_does_not_move_the_session(coordinator, worker, session):
    other = ModelWorker(coordinator, "w1").connect(T0)
    other.sessions["a"] = snapshot()
    event = SessionEvent(EventKind.EVICTED, other.sessions["a"], T0)
    coordinator.workers.happened(other.state(), event, T0)
    assert session.worker_id == "w0"
    assert other.log == ["close"]


def test_an_event_of_a_closed_session_closes_it_there_once(coordinator, worker, session):
    coordinator.close_session("a", T0 + 1)
    worker.happen(EventKind.GENERATE_FINISHED, "a", T0 + 1)
    assert worker.log.count("close") == 1
    worker.work(T0 + 2)
    worker.sessions["a"] = snapshot()
    worker.happen(EventKind.GENERATE_FINISHED, "a", T0 + 3)
    assert worker.log.count("close") == 2


# --- results ---


def test_an_eviction_refused_because_a_generate_runs_comes_when_it_ends(
    coordinator, worker, session
):
    coordinator.signal("a", wait(1), T0 + 1)
    evict = worker.queue.popleft()
    worker.start_generate("a", T0 + 1)
    worker.answer(evict, T0 + 1, code="FAILED_PRECONDITION", reason="SESSION_BUSY")
    assert worker.log.count("evict") == 1
    worker.finish_generate("a", T0 + 2)
    assert worker.log.count("evict") == 2
    worker.work(T0 + 2)
    assert not session.kv.resident


def test_a_stale_eviction_is_decided_again_with_the_new_generation(coordinator, worker, session):
    coordinator.signal("a", wait(1), T0 + 1)
    evict = worker.queue.popleft()
    worker.answer(
        evict, T0 + 1, code="FAILED_PRECONDITION", reason="STALE_GENERATION", generation=9
    )
    again = worker.received[-1]
    assert isinstance(again.action, Evict)
    assert again.command_id != evict.command_id
    assert again.expected_generation == 9


def test_a_stale_eviction_of_an_agent_that_woke_is_dropped(coordinator, worker, session):
    coordinator.signal("a", wait(1), T0 + 1)
    evict = worker.queue.popleft()
    coordinator.signal("a", compute(2), T0 + 1)
    worker.answer(
        evict, T0 + 1, code="FAILED_PRECONDITION", reason="STALE_GENERATION", generation=9
    )
    assert worker.log.count("evict") == 1


def test_a_worker_that_refuses_always_is_not_asked_without_end(coordinator, worker, session):
    coordinator.signal("a", wait(1), T0 + 1)
    now_s = T0 + 1
    for _ in range(50):
        while worker.queue:
            command = worker.queue.popleft()
            worker.answer(command, now_s, code="INTERNAL", reason="INTERNAL")
        now_s = now_s + 10.0
        coordinator.advance(now_s)
    assert 2 < worker.log.count("evict") < 10
    coordinator.signal("a", wait(2), now_s)
    assert worker.queue


def test_a_stale_result_without_news_does_not_loop(coordinator, worker, session):
    coordinator.signal("a", wait(1), T0 + 1)
    evict = worker.queue.popleft()
    worker.answer(
        evict,
        T0 + 1,
        code="FAILED_PRECONDITION",
        reason="STALE_GENERATION",
        generation=evict.expected_generation,
    )
    assert worker.log.count("evict") == 1
    assert coordinator.dispatcher.reviews.next_s() > T0 + 1


def test_a_restore_without_room_is_tried_again_soon(coordinator, worker, session):
    coordinator.signal("a", wait(1), T0 + 1)
    worker.work(T0 + 1)
    coordinator.signal("a", compute(2), T0 + 2)
    restore = worker.queue.popleft()
    worker.answer(restore, T0 + 2, code="RESOURCE_EXHAUSTED", reason="EXHAUSTED")
    due_s = coordinator.dispatcher.reviews.next_s()
    assert T0 + 2 < due_s < T0 + 3
    coordinator.advance(due_s)
    assert worker.log[-1] == "restore"
    worker.work(due_s)
    assert session.kv.resident


def test_a_session_its_worker_does_not_know_is_opened_at_the_next_signal(
    coordinator, worker, session
):
    del worker.sessions["a"]
    coordinator.signal("a", wait(1), T0 + 1)
    worker.work(T0 + 1)
    assert not session.known
    assert session.kv == NO_KV
    coordinator.signal("a", compute(2), T0 + 2)
    assert isinstance(worker.received[-1].action, Open)


def test_a_command_refused_unseen_says_nothing_of_the_session(coordinator, worker, session):
    before = session.kv
    coordinator.signal("a", wait(1), T0 + 1)
    evict = worker.queue.popleft()
    worker.answer(evict, T0 + 1, code="DEADLINE_EXCEEDED", reason="COMMAND_TIMEOUT", kv=NO_KV)
    assert session.kv == before
    coordinator.advance(coordinator.dispatcher.reviews.next_s())
    assert worker.log.count("evict") == 2


def test_repeated_and_unknown_results_change_nothing(coordinator, worker, session):
    coordinator.signal("a", wait(1), T0 + 1)
    evict = worker.queue.popleft()
    worker.answer(evict, T0 + 1, kv=Residency(4, 0, 4, 0, resident=False), generation=3)
    worker.answer(evict, T0 + 1, kv=Residency(9, 9, 9, 9, resident=True), generation=30)
    assert session.kv == Residency(4, 0, 4, 0, resident=False)
    assert session.generation == 3


def test_a_given_up_eviction_is_decided_again_later(coordinator, worker, session):
    coordinator.signal("a", wait(1), T0 + 1)
    config = coordinator.config
    now_s = T0 + 1
    for _ in range(config.command_attempts):
        now_s += config.command_timeout_s
        coordinator.advance(now_s)
    assert session.move_id == ""
    assert session.failures == 1
    coordinator.advance(coordinator.dispatcher.reviews.next_s())
    ids = [command.command_id for command in worker.received if isinstance(command.action, Evict)]
    assert len(ids) == config.command_attempts + 1
    assert len(set(ids)) == 2
