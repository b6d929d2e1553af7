"""Views that policies' tests start from."""

from __future__ import annotations

from typing import Any

from services.scheduler.domain import Phase, PoolState, Residency
from services.scheduler.policy.view import SessionView, WorkerView

AWAY = Residency(4, 4, 4, 0, resident=False)


def session(session_id: str = "a", **fields: Any) -> SessionView:
    defaults: dict[str, Any] = {
        "session_id": session_id,
        "tenant_id": "",
        "priority": 0,
        "phase": Phase.IO_WAIT,
        "phase_since_s": 100.0,
        "tool_name": "",
        "expected_wake_s": None,
        "worker_id": "w0",
        "connected": True,
        "generating": False,
        "context_length": 64,
        "last_active_s": 100.0,
        "kv": AWAY,
    }
    return SessionView(**(defaults | fields))


def worker(free: int = 100, host_free: int = 400, **fields: Any) -> WorkerView:
    defaults: dict[str, Any] = {
        "worker_id": "w0",
        "model": "tiny",
        "draining": False,
        "block_bytes": 1_000_000,
        "block_size_tokens": 16,
        "device": PoolState(100, free, 100 - free),
        "host": PoolState(400, host_free, 400 - host_free),
        "load_bytes_per_s": 1e9,
        "prefill_tokens_per_s": 1e3,
    }
    return WorkerView(**(defaults | fields))
