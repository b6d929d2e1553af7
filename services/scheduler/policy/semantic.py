"""The policy that follows the agents' phases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from services.scheduler.domain import Evict, Phase, Restore, SetHint
from services.scheduler.policy import drop, prefetch
from services.scheduler.policy.base import (
    NOTHING,
    Cause,
    Decision,
    Policy,
    PolicyCommand,
    moved_to_host,
    one,
)
from services.scheduler.policy.explanation import Explanation, explain
from services.scheduler.policy.order import forecast_of, wake_to_tell
from services.scheduler.policy.room import UNLIMITED, Room, work_room
from services.scheduler.policy.view import SessionView, SystemView, WorkerView

SIGNALLED_IDLE_FACTOR = 10.0
"""How many times the idle threshold a session in COMPUTE may do nothing.

Its client has said that it is about to compute, so it is given longer than one that says nothing;
one that died without a word still does not hold the device for ever."""

RETRY_DELAY_S = 0.1
"""Before a failed command is decided on again; doubled with each failure in a row."""

LEARN_DELAY_S = 1.0
LEARN_DELAY_SHARE = 0.1
"""After how long, at least and as a share of the wait, one of whom nothing is known is looked at
again."""

MAX_FAILURES = 6
"""Failures in a row after which the session is left alone until something happens to it."""


class Semantic(Policy):
    """Evicts on IO_WAIT, restores on COMPUTE, and before COMPUTE what is expected soon.

    An eviction is lazy and costs nothing if nobody needs the room, so it is always worth asking
    for; when the agent is expected back goes with it, so that the room of those who will be away
    longest is taken first. Clients that say nothing are found out by their idleness.
    """

    name: ClassVar[str] = "semantic"
    uses_signals: ClassVar[bool] = True
    heeds: ClassVar[frozenset[str]] = frozenset(
        {
            "restore",
            "order",
            "refresh",
            "prefetch",
            "drop",
            "idle",
            "admission",
            "backlog_s",
            "recompute_share",
        }
    )

    def decide(
        self, cause: Cause, session: SessionView, system: SystemView, now_s: float
    ) -> Decision:
        """Returns what the session's phase, or its silence, asks for."""
        if not session.connected:
            return Decision(reason="no worker holds it", deferred=True)
        waiting = session.phase is Phase.IO_WAIT
        if session.generating:
            return Decision(reason="generating", deferred=waiting)
        if cause is Cause.MOVE_FAILED:
            return _failed(session, now_s)
        if waiting:
            return self._waiting(cause, session, system, now_s)
        if session.phase is Phase.COMPUTE and self._must_restore(cause, session, now_s):
            # Reviewed, should its Generate never come.
            return one(session, Restore(), "wakes", self._idle_from(session))
        return self._idle(session, system, now_s)

    def fill(self, worker: WorkerView, system: SystemView) -> Sequence[PolicyCommand]:
        """Returns the prefetches that there is room for."""
        sessions = system.sessions
        under_way = sessions.prefetching(worker.worker_id)
        return prefetch.choose(worker, sessions.wanting(worker.worker_id), under_way)

    def relieve(
        self, worker: WorkerView, system: SystemView, now_s: float
    ) -> Sequence[PolicyCommand]:
        """Returns what to drop, if both pools are full."""
        if not self._options.drop:
            return ()
        sessions = system.sessions
        middle_s = sessions.middle_wake_s(worker.worker_id)
        return drop.choose(worker, sessions.away(worker.worker_id), middle_s, now_s)

    def room(self, worker: WorkerView) -> Room:
        """Returns how much new work lets those that are there go on undisturbed."""
        options = self._options
        if not options.admission:
            return UNLIMITED
        return work_room(worker, options.backlog_s, options.recompute_share)

    def explain(self, session: SessionView, system: SystemView, now_s: float) -> Explanation | None:
        """Returns what each choice about the session costs."""
        return explain(session, system, now_s)

    def _waiting(
        self, cause: Cause, session: SessionView, system: SystemView, now_s: float
    ) -> Decision:
        if not session.kv.total_blocks and not session.context_length:
            # The end of its Generate may not have been reported yet.
            return Decision(reason="nothing to evict", deferred=True)
        if cause is Cause.SIGNAL:
            return self._let_go(session, system, now_s, "waits for a tool")
        if moved_to_host(session):
            return self._away(session, system, now_s)
        if session.prefetched:
            until_s = prefetch.give_up_s(session)
            if until_s is not None and until_s > now_s:
                return Decision(review_at_s=until_s, reason="prefetched")
            return self._let_go(session, system, now_s, "did not wake when expected")
        return self._let_go(session, system, now_s, "waits for a tool")

    def _let_go(
        self, session: SessionView, system: SystemView, now_s: float, reason: str
    ) -> Decision:
        """Returns the decision to evict a session and to tell when it is expected back."""
        wake_s = wake_to_tell(session, now_s) if self._options.order else None
        command = PolicyCommand(session.session_id, Evict(expected_wake_s=wake_s), reason)
        return Decision(
            (command,),
            self._next_look(session, system, wake_s, now_s),
            reason,
            explanation=self.explain(session, system, now_s),
        )

    def _away(self, session: SessionView, system: SystemView, now_s: float) -> Decision:
        """Returns what to do about a session whose device blocks were let go before."""
        commands: tuple[PolicyCommand, ...] = ()
        wake_s = session.expected_wake_s
        told = wake_s is not None and wake_s > now_s
        if self._options.order and self._options.refresh and not told:
            before_s, wake_s = wake_s, wake_to_tell(session, now_s)
            # A worker that evicted it by itself still has the time of its last wake: it must hear
            # that nobody knows of another.
            if wake_s is not None or before_s is not None or session.phase is not Phase.IO_WAIT:
                hint = SetHint(expected_wake_s=wake_s)
                commands = (PolicyCommand(session.session_id, hint, "expected later"),)
        wanted = self._wanted(session, system, now_s)
        return Decision(
            commands,
            self._next_look(session, system, wake_s, now_s),
            "wanted back soon" if wanted else "evicted already",
            wants_prefetch=wanted,
        )

    def _wanted(self, session: SessionView, system: SystemView, now_s: float) -> bool:
        worker = system.workers.get(session.worker_id)
        if not self._options.prefetch or worker is None:
            return False
        due_s = prefetch.due_s(session, worker)
        return due_s is not None and due_s <= now_s and prefetch.may_be_gone(session, worker)

    def _next_look(
        self, session: SessionView, system: SystemView, wake_s: float | None, now_s: float
    ) -> float | None:
        """Returns when there may be something to do about a session that is away."""
        times = []
        foretells = self._options.order or self._options.prefetch
        if foretells and session.phase is Phase.IO_WAIT and forecast_of(session) is None:
            # By then others' calls may have ended that tell how long this one takes.
            waited_s = now_s - session.phase_since_s
            times.append(now_s + max(LEARN_DELAY_S, LEARN_DELAY_SHARE * waited_s))
        if self._options.order and self._options.refresh and wake_s is not None:
            times.append(wake_s)
        worker = system.workers.get(session.worker_id)
        # A worker that never was full has all that was let go still there.
        if self._options.prefetch and worker is not None and worker.full_s is not None:
            due_s = prefetch.due_s(session, worker)
            if due_s is not None:
                times.append(due_s)
        return min((at_s for at_s in times if at_s > now_s), default=None)

    def _must_restore(self, cause: Cause, session: SessionView, now_s: float) -> bool:
        if not self._options.restore:
            return False
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

    def _idle(self, session: SessionView, system: SystemView, now_s: float) -> Decision:
        if not session.kv.total_blocks or not self._options.idle:
            return NOTHING
        due_s = self._idle_from(session)
        if due_s > now_s:
            return Decision(review_at_s=due_s, reason="may become idle")
        if moved_to_host(session):
            return self._away(session, system, now_s)
        if session.prefetched:
            until_s = prefetch.give_up_s(session)
            if until_s is not None and until_s > now_s:
                return Decision(review_at_s=until_s, reason="prefetched")
        return self._let_go(session, system, now_s, "idle")

    def _idle_from(self, session: SessionView) -> float:
        """Returns when the session, if nothing happens to it, counts as idle."""
        factor = 1.0 if session.phase is Phase.OPEN else SIGNALLED_IDLE_FACTOR
        return session.last_active_s + self._options.idle_threshold_s * factor


def _failed(session: SessionView, now_s: float) -> Decision:
    if session.failures > MAX_FAILURES:
        return Decision(reason="failed too often")
    delay_s = RETRY_DELAY_S * 2 ** max(0, session.failures - 1)
    return Decision(review_at_s=now_s + delay_s, reason="failed; decided again soon")
