from __future__ import annotations

import pytest

from services.scheduler.domain import Evict, Phase, Residency
from services.scheduler.policy.base import Cause
from services.scheduler.policy.options import PolicyOptions
from services.scheduler.policy.ttl import Ttl
from services.scheduler.policy.view import SystemView
from tests.support.policy_views import session

HERE = Residency(4, 4, 4, 0, resident=True)


@pytest.fixture
def policy() -> Ttl:
    return Ttl(PolicyOptions(ttl_s=3.0))


def test_it_is_pinned_for_its_time_and_then_let_go(policy):
    waiting = session(kv=HERE)
    pinned = policy.decide(Cause.SIGNAL, waiting, SystemView(), 100.0)
    assert not pinned.commands
    assert pinned.review_at_s == 103.0
    over = policy.decide(Cause.REVIEW, waiting, SystemView(), 103.0)
    assert [command.action for command in over.commands] == [Evict()]
    assert over.review_at_s is None
    gone = session()
    assert not policy.decide(Cause.MOVED, gone, SystemView(), 104.0).commands


def test_a_wake_is_left_to_the_generate(policy):
    woken = session(phase=Phase.COMPUTE)
    assert not policy.decide(Cause.SIGNAL, woken, SystemView(), 101.0).commands


def test_while_it_cannot_be_done_it_is_put_off(policy):
    for waiting in (session(kv=HERE, connected=False), session(kv=HERE, generating=True)):
        decision = policy.decide(Cause.REVIEW, waiting, SystemView(), 110.0)
        assert decision.deferred
        assert not decision.commands
