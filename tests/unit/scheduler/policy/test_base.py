from __future__ import annotations

from typing import Any

import pytest

from services.common.errors import ConfigError
from services.scheduler.domain import NO_KV, Phase, PoolState, Residency, WorkerMode
from services.scheduler.policy.base import (
    Cause,
    make_policy,
    moved_to_host,
    registry,
)
from services.scheduler.policy.options import PolicyOptions
from services.scheduler.policy.room import UNLIMITED
from services.scheduler.policy.view import NoSessions, SessionView, SystemView, WorkerView


def session(**fields) -> SessionView:
    defaults: dict[str, Any] = {
        "session_id": "a",
        "tenant_id": "",
        "priority": 0,
        "phase": Phase.IO_WAIT,
        "phase_since_s": 0.0,
        "tool_name": "",
        "expected_wake_s": None,
        "worker_id": "w0",
        "connected": True,
        "generating": False,
        "context_length": 64,
        "last_active_s": 0.0,
    }
    return SessionView(**(defaults | fields))


def test_every_policy_is_found_by_its_own_name():
    for name in registry():
        assert make_policy(name, PolicyOptions()).name == name


def test_an_unknown_policy_is_refused_with_those_there_are():
    with pytest.raises(ConfigError, match=r"--policy nope.*reactive-lru, .*semantic, static, ttl"):
        make_policy("nope", PolicyOptions())


@pytest.mark.parametrize("cause", list(Cause))
@pytest.mark.parametrize("phase", list(Phase)[:3])
@pytest.mark.parametrize("name", ["reactive-lru", "reactive-recompute"])
def test_the_reactive_policies_command_nothing(name, cause, phase):
    policy = make_policy(name, PolicyOptions())
    assert not policy.uses_signals
    decision = policy.decide(cause, session(phase=phase), SystemView(), 100.0)
    assert not decision.commands
    assert decision.review_at_s is None
    worker = WorkerView("w0", "tiny", False, 1024, 16, PoolState(), PoolState())
    assert not policy.fill(worker, SystemView())
    assert not policy.relieve(worker, SystemView(), 100.0)
    assert policy.room(worker) == UNLIMITED
    assert policy.explain(session(), SystemView(), 100.0) is None


@pytest.mark.parametrize(
    ("resident", "moving", "expected"),
    [
        (True, "", False),
        (False, "", True),
        (True, "evict", True),
        (False, "restore", False),
        (True, "restore", False),
    ],
)
def test_what_moves_counts_as_moved(resident, moving, expected):
    kv = Residency(4, 4, 4, 0, resident)
    assert moved_to_host(session(kv=kv, moving=moving)) == expected


def test_an_empty_system_has_no_sessions():
    sessions = SystemView().sessions
    assert isinstance(sessions, NoSessions)
    assert sessions.get("a") is None
    assert list(sessions.in_phase(Phase.OPEN)) == []
    assert sessions.count(Phase.OPEN) == 0
    assert list(sessions.away("w0")) == list(sessions.wanting("w0")) == []
    assert sessions.middle_wake_s("w0") is None
    assert sessions.prefetching("w0") == 0
    assert session().kv == NO_KV


def test_each_policy_says_how_workers_are_to_serve():
    modes = {name: kind.worker_mode for name, kind in registry().items()}
    assert modes == {
        "semantic": WorkerMode(),
        "ttl": WorkerMode(),
        "reactive-lru": WorkerMode(write_through=False),
        "reactive-recompute": WorkerMode(write_through=False, offload=False),
        "static": WorkerMode(write_through=False, offload=False, share_prefixes=False),
    }
