"""The policy that pins KV for a fixed time after a tool call has begun."""

from __future__ import annotations

from typing import ClassVar

from services.scheduler.domain import Evict, Phase
from services.scheduler.policy.base import (
    NOTHING,
    Cause,
    Decision,
    Policy,
    moved_to_host,
    one,
)
from services.scheduler.policy.view import SessionView, SystemView


class Ttl(Policy):
    """Keeps a session's KV on the device for a time-to-live after IO_WAIT, then lets it go.

    This is Continuum's idea ("Continuum: Efficient and Robust Multi-Turn LLM Agent Scheduling with
    KV Cache Time-to-Live", 2025) with one fixed time for all tools. It knows that a tool runs and
    not that it has come back: the next Generate brings the KV back.
    """

    name: ClassVar[str] = "ttl"
    uses_signals: ClassVar[bool] = True
    heeds: ClassVar[frozenset[str]] = frozenset({"ttl_s"})

    def decide(
        self, cause: Cause, session: SessionView, system: SystemView, now_s: float
    ) -> Decision:
        """Returns whether the session's time is over."""
        del cause, system
        if session.phase is not Phase.IO_WAIT:
            return NOTHING
        if not session.connected or session.generating:
            return Decision(reason="not to be had yet", deferred=True)
        due_s = session.phase_since_s + self._options.ttl_s
        if due_s > now_s:
            return Decision(review_at_s=due_s, reason="pinned")
        if not session.kv.total_blocks or moved_to_host(session):
            return Decision(reason="evicted already")
        return one(session, Evict(), "its time is over")
