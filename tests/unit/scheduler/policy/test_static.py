from __future__ import annotations

import math

from services.scheduler.policy.options import PolicyOptions
from services.scheduler.policy.static import Static
from tests.support.policy_views import worker


def test_as_many_are_let_in_as_have_a_whole_reservation():
    # 100 blocks of 16 tokens; 33 blocks for each.
    policy = Static(PolicyOptions(reserve_tokens=520))
    assert policy.room(worker()).sessions == 3
    taken = policy.room(worker(sessions=2))
    assert (taken.sessions, taken.tokens) == (1, math.inf)
    full = policy.room(worker(sessions=3))
    assert full.sessions == 0
    assert "3 of 3 reservations of 520 tokens" in full.reason


def test_what_is_reserved_is_the_longest_context_unless_said():
    policy = Static(PolicyOptions())
    assert policy.room(worker(max_context_length=800)).sessions == 2
    assert policy.room(worker()).sessions == 0
