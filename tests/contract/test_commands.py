"""A command as the scheduler sends it and its worker takes it, on clocks that do not agree."""

from __future__ import annotations

import pytest

from services.scheduler.convert import workers as scheduler
from services.scheduler.domain import Command, Drop, Evict, Open, Prefetch, Restore
from services.scheduler.reconciler import Reconciler
from services.worker.front.convert import control as worker

NOW_S = 1_795_466_854.0


@pytest.mark.parametrize("ahead_s", [0.0, 10.0, -10.0, 86_400.0, -86_400.0])
@pytest.mark.parametrize("action", [Evict(), Restore(), Prefetch(), Drop()])
def test_a_worker_has_as_long_as_the_scheduler_gives_it(action, ahead_s):
    command = Reconciler("epoch", timeout_s=10.0, attempts=3).begin("w", "a", action, NOW_S)
    sent = scheduler.to_command(command, NOW_S).command
    received_ns = int((NOW_S + ahead_s) * 1e9)
    taken = worker.command(sent, received_ns)
    assert taken.deadline_ns is not None
    assert taken.deadline_ns - received_ns == 10 * 10**9


def test_a_command_that_waited_before_it_was_sent_has_that_much_less():
    command = Command("c", "a", Restore(), deadline_s=NOW_S + 10.0)
    sent = scheduler.to_command(command, NOW_S + 4.0).command
    assert worker.command(sent, 7).deadline_ns == 7 + 6 * 10**9


def test_what_moves_nothing_has_no_deadline():
    command = Reconciler("epoch", timeout_s=10.0, attempts=3).begin("w", "a", Open("", 0), NOW_S)
    assert worker.command(scheduler.to_command(command, NOW_S).command, 7).deadline_ns is None
