from __future__ import annotations

import pytest

from services.scheduler.domain import Close, CommandResult, Evict, Open, Restore
from services.scheduler.reconciler import Overdue, Reconciler, failed


@pytest.fixture
def reconciler() -> Reconciler:
    return Reconciler("epoch", timeout_s=10.0, attempts=3)


EVICT = Evict()


def begin(reconciler, action=EVICT, now_s=100.0, worker="w0", **fields):
    return reconciler.begin(worker, "a", action, now_s, **fields)


def done(command, **fields) -> CommandResult:
    return CommandResult(command.command_id, command.session_id, **fields)


def test_ids_are_unique_and_name_the_scheduler(reconciler):
    ids = [begin(reconciler).command_id for _ in range(3)]
    assert len(set(ids)) == 3
    assert all(name.startswith("epoch-") for name in ids)


def test_only_what_moves_kv_has_a_deadline(reconciler):
    assert begin(reconciler, Evict()).deadline_s == 110.0
    assert begin(reconciler, Restore()).deadline_s == 110.0
    assert begin(reconciler, Open("", 0)).deadline_s is None
    assert begin(reconciler, Close()).deadline_s is None


def test_a_result_ends_a_command_once(reconciler):
    heard: list[CommandResult] = []
    command = begin(reconciler, on_done=heard.append)
    result = done(command)
    entry = reconciler.end(result)
    assert entry is not None
    assert entry.command is command
    assert reconciler.end(result) is None
    assert heard == [result]
    assert len(reconciler) == 0
    assert reconciler.next_s() is None
    assert reconciler.of_worker("w0") == []


def test_an_unknown_result_changes_nothing(reconciler):
    begin(reconciler)
    assert reconciler.end(CommandResult("other", "a")) is None
    assert len(reconciler) == 1


def test_an_overdue_command_is_sent_again_under_its_id_until_given_up(reconciler):
    command = begin(reconciler)
    assert reconciler.overdue(109.9) == Overdue((), ())
    deadlines = []
    now_s = 100.0
    for _ in range(2):
        now_s += 10.0
        overdue = reconciler.overdue(now_s)
        assert not overdue.given_up
        (entry,) = overdue.again
        again = reconciler.renew(entry, now_s)
        assert again.command_id == command.command_id
        deadlines.append(again.deadline_s)
    assert deadlines == [120.0, 130.0]
    overdue = reconciler.overdue(130.0)
    assert not overdue.again
    assert [entry.command.command_id for entry in overdue.given_up] == [command.command_id]
    assert overdue.given_up[0].attempts == 3


def test_a_superseded_command_is_not_sent_again(reconciler):
    command = begin(reconciler)
    reconciler.supersede(command.command_id)
    overdue = reconciler.overdue(110.0)
    assert not overdue.again
    assert len(overdue.given_up) == 1


def test_a_superseded_command_that_somebody_waits_for_is(reconciler):
    command = begin(reconciler, on_done=lambda result: None)
    reconciler.supersede(command.command_id)
    assert len(reconciler.overdue(110.0).again) == 1


def test_commands_are_kept_by_worker_in_order(reconciler):
    first = begin(reconciler, worker="w0")
    other = begin(reconciler, worker="w1")
    second = begin(reconciler, worker="w0")
    ids = [entry.command.command_id for entry in reconciler.of_worker("w0")]
    assert ids == [first.command_id, second.command_id]
    reconciler.end(done(first))
    assert [e.command for e in reconciler.of_worker("w0")] == [second]
    assert [e.command for e in reconciler.of_worker("w1")] == [other]


def test_closings_are_known_until_the_last_has_ended(reconciler):
    commands = [begin(reconciler, Close()) for _ in range(2)]
    begin(reconciler, Evict())
    for command in commands:
        assert reconciler.is_closing("w0", "a")
        assert not reconciler.is_closing("w1", "a")
        reconciler.end(done(command))
    assert not reconciler.is_closing("w0", "a")


def test_a_command_that_failed_unanswered_names_why(reconciler):
    command = begin(reconciler)
    entry = reconciler.get(command.command_id)
    assert entry is not None
    result = failed(entry, "DEADLINE_EXCEEDED", "COMMAND_TIMEOUT", "late")
    assert not result.ok
    assert (result.session_id, result.reason) == ("a", "COMMAND_TIMEOUT")
