"""What a policy is, and where policies are found by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from services.common.errors import ConfigError
from services.scheduler.domain import Action, WorkerMode
from services.scheduler.policy.explanation import Explanation
from services.scheduler.policy.options import PolicyOptions
from services.scheduler.policy.room import UNLIMITED, Room
from services.scheduler.policy.view import SessionView, SystemView, WorkerView


@dataclass(frozen=True, slots=True)
class PolicyCommand:
    """An action on one session, and why in a few words for the trace."""

    session_id: str
    action: Action
    reason: str


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do about one session.

    Attributes:
        commands: To be sent now, in this order; they may concern other sessions too.
        review_at_s: Ask again about this session then, unless something else is asked about it
            before; None: only when something happens to it.
        reason: Why, in a few words, also where nothing is to be done.
        deferred: What is due cannot be done yet, because a Generate runs or no worker holds the
            session. The question will be asked again when that changes, with the same trace
            context.
        wants_prefetch: The session is to come back as soon as `Policy.fill` finds room for it;
            until then it is among `Sessions.wanting`.
        explanation: The numbers behind it; None: it follows from none.
    """

    commands: tuple[PolicyCommand, ...] = ()
    review_at_s: float | None = None
    reason: str = ""
    deferred: bool = False
    wants_prefetch: bool = False
    explanation: Explanation | None = None


NOTHING = Decision()


class Cause(Enum):
    """Why a policy is asked about a session.

    Attributes:
        SIGNAL: Its client said a phase that is new.
        GENERATE_STARTED: Its worker took a Generate on.
        GENERATE_FINISHED: A Generate ended.
        MOVED: Its worker moved its KV on its own account.
        MOVE_FAILED: A command was refused or not answered; to repeat it at once would be vain.
        STALE: A command was refused because the session has moved on since; its view is new now.
        RECONNECTED: Its worker has come back and said what it holds.
        REVIEW: The time of an earlier decision's `review_at_s` has come.
    """

    SIGNAL = "signal"
    GENERATE_STARTED = "generate_started"
    GENERATE_FINISHED = "generate_finished"
    MOVED = "moved"
    MOVE_FAILED = "move_failed"
    STALE = "stale"
    RECONNECTED = "reconnected"
    REVIEW = "review"


class Policy:
    """Decides where sessions' KV shall lie; this one leaves everything to the workers.

    All that it answers is a pure function of what it is shown. Each call is about one session or
    one worker and must take time independent of how many sessions there are.

    Args:
        options: What it was told at start.

    Attributes:
        name: What it is called on the command line.
        uses_signals: Whether it is asked when a client says a phase.
        heeds: Names of the `PolicyOptions` that it heeds.
        worker_mode: How workers are to serve under it.
    """

    name: ClassVar[str]
    uses_signals: ClassVar[bool] = False
    heeds: ClassVar[frozenset[str]] = frozenset()
    worker_mode: ClassVar[WorkerMode] = WorkerMode()

    def __init__(self, options: PolicyOptions) -> None:
        self._options = options

    def decide(
        self, cause: Cause, session: SessionView, system: SystemView, now_s: float
    ) -> Decision:
        """Returns what to do about a session to which something has happened."""
        del cause, session, system, now_s
        return NOTHING

    def fill(self, worker: WorkerView, system: SystemView) -> Sequence[PolicyCommand]:
        """Returns which of the sessions that want it come back to a worker now."""
        del worker, system
        return ()

    def relieve(
        self, worker: WorkerView, system: SystemView, now_s: float
    ) -> Sequence[PolicyCommand]:
        """Returns what to do about a worker that has just reported how full it is."""
        del worker, system, now_s
        return ()

    def room(self, worker: WorkerView) -> Room:
        """Returns how much new work a worker may be given now."""
        del worker
        return UNLIMITED

    def explain(self, session: SessionView, system: SystemView, now_s: float) -> Explanation | None:
        """Returns the numbers behind what it does about a session; None: there are none."""
        del session, system, now_s
        return None


def make_policy(name: str, options: PolicyOptions) -> Policy:
    """Returns the policy of a name.

    Raises:
        ConfigError: There is none of that name.
    """
    return policy_class(name)(options)


def policy_class(name: str) -> type[Policy]:
    """Returns the class of a policy by its name.

    Raises:
        ConfigError: There is none of that name.
    """
    classes = registry()
    if name not in classes:
        raise ConfigError(
            f"--policy {name}: no such policy; there are {', '.join(sorted(classes))}"
        )
    return classes[name]


def registry() -> dict[str, type[Policy]]:
    """Returns every policy's class by its name."""
    from services.scheduler.policy.reactive_lru import ReactiveLru
    from services.scheduler.policy.reactive_recompute import ReactiveRecompute
    from services.scheduler.policy.semantic import Semantic
    from services.scheduler.policy.static import Static
    from services.scheduler.policy.ttl import Ttl

    classes: tuple[type[Policy], ...] = (ReactiveLru, ReactiveRecompute, Semantic, Static, Ttl)
    return {kind.name: kind for kind in classes}


def one(
    session: SessionView, action: Action, reason: str, review_at_s: float | None = None
) -> Decision:
    """Returns the decision to do one thing to the session asked about."""
    command = PolicyCommand(session.session_id, action, reason)
    return Decision((command,), review_at_s, reason)


def moved_to_host(session: SessionView) -> bool:
    """Whether the session's device blocks have been let go, or are about to be."""
    return session.moving == "evict" or (not session.kv.resident and not session.moving)
