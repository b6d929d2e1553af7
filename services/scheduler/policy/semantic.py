"""The policy that follows the agents' phases."""

from __future__ import annotations

from collections.abc import Sequence

from services.scheduler.domain import Evict, Phase, Restore
from services.scheduler.policy.base import (
    NOTHING,
    Cause,
    Decision,
    PolicyCommand,
    PolicyOptions,
    moved_to_host,
    one,
)
from services.scheduler.policy.view import SessionView, SystemView

SIGNALLED_IDLE_FACTOR = 10.0
"""How many times the idle threshold a session in COMPUTE may do nothing.

Its client has said that it is about to compute, so it is given longer than one that says nothing;
one that died without a word still does not hold the device for ever."""

RETRY_DELAY_S = 0.1
"""Before a failed command is decided on again; doubled with each failure in a row."""

MAX_FAILURES = 6
"""Failures in a row after which the session is left alone until something happens to it."""


class Semantic:
    """Evicts on IO_WAIT, restores on COMPUTE; finds out by idleness about clients that are silent.

    An eviction is lazy and costs nothing if nobody needs the room, so it is always worth asking
    for; when the agent is expected back goes with it, so that the room of those who will be away
    longest is taken first.
    """

    name = "semantic"
    uses_signals = True

    def __init__(self, options: PolicyOptions) -> None:
        self._idle_s = options.idle_threshold_s

    def decide(
        self, cause: Cause, session: SessionView, system: SystemView, now_s: float
    ) -> Decision:
        """Returns what the session's phase, or its silence, asks for."""
        del system
        if not session.connected:
            return Decision(reason="no worker holds it", deferred=True)
        waiting = session.phase is Phase.IO_WAIT
        if session.generating:
            return Decision(reason="generating", deferred=waiting)
        if cause is Cause.MOVE_FAILED:
            return self._failed(session, now_s)
        if waiting:
            return self._waiting(cause, session)
        if session.phase is Phase.COMPUTE and self._must_restore(cause, session, now_s):
            # Reviewed, should its Generate never come.
            return one(session, Restore(), "wakes", self._idle_from(session))
        return self._idle(session, now_s)

    def on_tick(self, system: SystemView, now_s: float) -> Sequence[PolicyCommand]:
        """Returns nothing: every session is decided about when something happens to it."""
        del system, now_s
        return ()

    @staticmethod
    def _failed(session: SessionView, now_s: float) -> Decision:
        if session.failures > MAX_FAILURES:
            return Decision(reason="failed too often")
        delay = RETRY_DELAY_S * 2 ** max(0, session.failures - 1)
        return Decision(review_at_s=now_s + delay, reason="failed; decided again soon")

    @staticmethod
    def _waiting(cause: Cause, session: SessionView) -> Decision:
        if not session.kv.total_blocks and not session.context_length:
            # The end of its Generate may not have been reported yet.
            return Decision(reason="nothing to evict", deferred=True)
        if cause is not Cause.SIGNAL and moved_to_host(session):
            return Decision(reason="evicted already")
        return one(session, Evict(expected_wake_s=session.expected_wake_s), "waits for a tool")

    def _must_restore(self, cause: Cause, session: SessionView, now_s: float) -> bool:
        if not session.kv.total_blocks and not session.context_length:
            return False
        if cause is Cause.SIGNAL:
            # Also if it is believed to be on the device: the worker may have taken its blocks a
            # moment ago, and restoring what is there costs nothing.
            return True
        # A session whose KV was taken after its last Generate is restored by its next one; one
        # that has said it wakes and was not heard of since is still waited for.
        if cause in {Cause.GENERATE_FINISHED, Cause.MOVED} or not moved_to_host(session):
            return False
        return session.kv.total_blocks > 0 and self._idle_from(session) > now_s

    def _idle(self, session: SessionView, now_s: float) -> Decision:
        if not session.kv.total_blocks:
            return NOTHING
        due = self._idle_from(session)
        if due > now_s:
            return Decision(review_at_s=due, reason="may become idle")
        if moved_to_host(session):
            return Decision(reason="evicted already")
        return one(session, Evict(), "idle")

    def _idle_from(self, session: SessionView) -> float:
        """Returns when the session, if nothing happens to it, counts as idle."""
        factor = 1.0 if session.phase is Phase.OPEN else SIGNALLED_IDLE_FACTOR
        return session.last_active_s + self._idle_s * factor
