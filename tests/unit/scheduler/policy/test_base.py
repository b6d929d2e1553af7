from __future__ import annotations

from typing import Any

import pytest

from services.common.errors import ConfigError
from services.scheduler.domain import NO_KV, Phase, Residency
from services.scheduler.policy.base import (
    Cause,
    PolicyOptions,
    make_policy,
    moved_to_host,
    registry,
)
from services.scheduler.policy.view import NoSessions, SessionView, SystemView


def session(**fields) -> SessionView:
    defaults: dict[str, Any] = {
        "session_id": "a",
        "tenant_id": "",
        "priority": 0,
        "phase": Phase.IO_WAIT,
        "phase_since_s": 0.0,
        "tool_name": "",
        "expected_wake_s": None,
        "early_wake_s": None,
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
    with pytest.raises(ConfigError, match=r"--policy nope.*reactive-lru, semantic"):
        make_policy("nope", PolicyOptions())


@pytest.mark.parametrize("cause", list(Cause))
@pytest.mark.parametrize("phase", list(Phase)[:3])
def test_the_reactive_policy_commands_nothing(cause, phase):
    policy = make_policy("reactive-lru", PolicyOptions())
    assert not policy.uses_signals
    decision = policy.decide(cause, session(phase=phase), SystemView(), 100.0)
    assert not decision.commands
    assert decision.review_at_s is None
    assert policy.on_tick(SystemView(), 100.0) == ()


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
    assert session().kv == NO_KV
