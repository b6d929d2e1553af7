from __future__ import annotations

import pytest

from services.scheduler.domain import PoolState, Prefetch
from services.scheduler.policy import prefetch
from tests.support.policy_views import session, worker

WANTING = [session(name) for name in "abcdef"]


def chosen(*args):
    commands = prefetch.choose(*args)
    assert all(command.action == Prefetch() for command in commands)
    return "".join(command.session_id for command in commands)


def test_the_nearest_come_first_and_few_at_once():
    assert chosen(worker(), WANTING, 0) == "abcd"
    assert chosen(worker(), WANTING, prefetch.AT_ONCE - 1) == "a"
    assert chosen(worker(), WANTING, prefetch.AT_ONCE) == ""


def test_they_take_what_is_free_or_clean_and_leave_a_reserve():
    # 5 of 100 are reserved; each takes 4.
    assert chosen(worker(device=PoolState(100, 3, 85, 12)), WANTING, 0) == "ab"
    assert chosen(worker(device=PoolState(100, 8, 92)), WANTING, 0) == ""


def test_who_wakes_later_does_not_overtake_whom_there_is_no_room_for():
    large = session("large", kv=WANTING[0].kv._replace(total_blocks=50))
    assert chosen(worker(free=30), [large, *WANTING], 0) == ""


@pytest.mark.parametrize(
    "fields", [{"prefetched_blocks": 90}, {"unreported_blocks": 90}, {"prefetch_refused": True}]
)
def test_what_was_promised_since_the_last_report_is_not_promised_twice(fields):
    assert chosen(worker(**fields), WANTING, 0) in {"", "a"}
    assert chosen(worker(), WANTING, 0) == "abcd"
