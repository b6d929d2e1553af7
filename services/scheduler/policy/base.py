"""What a policy is, and where policies are found by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from services.common.errors import ConfigError
from services.scheduler.domain import Action
from services.scheduler.policy.view import SessionView, SystemView


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
    """

    commands: tuple[PolicyCommand, ...] = ()
    review_at_s: float | None = None
    reason: str = ""
    deferred: bool = False


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


@dataclass(frozen=True, slots=True)
class PolicyOptions:
    """What a policy may be told at start.

    Attributes:
        idle_threshold_s: A session whose client never signalled counts as waiting for a tool once
            it has done nothing for this long.
    """

    idle_threshold_s: float = 1.0


class Policy(Protocol):
    """Decides where sessions' KV shall lie; a pure function of what it is shown.

    Each call is about one session and must take time independent of how many there are; only
    `on_tick` may look at all.
    """

    name: str
    uses_signals: bool

    def decide(
        self, cause: Cause, session: SessionView, system: SystemView, now_s: float
    ) -> Decision:
        """Returns what to do about a session to which something has happened."""

    def on_tick(self, system: SystemView, now_s: float) -> Sequence[PolicyCommand]:
        """Returns what to do about the system as a whole; called at a steady interval."""


Factory = Callable[[PolicyOptions], Policy]


def make_policy(name: str, options: PolicyOptions) -> Policy:
    """Returns the policy of a name.

    Raises:
        ConfigError: There is none of that name.
    """
    factories = registry()
    if name not in factories:
        raise ConfigError(
            f"--policy {name}: no such policy; there are {', '.join(sorted(factories))}"
        )
    return factories[name](options)


def registry() -> dict[str, Factory]:
    """Returns every policy's factory by its name."""
    from services.scheduler.policy.reactive_lru import ReactiveLru
    from services.scheduler.policy.semantic import Semantic

    return {"semantic": Semantic, "reactive-lru": ReactiveLru}


def one(
    session: SessionView, action: Action, reason: str, review_at_s: float | None = None
) -> Decision:
    """Returns the decision to do one thing to the session asked about."""
    command = PolicyCommand(session.session_id, action, reason)
    return Decision((command,), review_at_s, reason)


def moved_to_host(session: SessionView) -> bool:
    """Whether the session's device blocks have been let go, or are about to be."""
    return session.moving == "evict" or (not session.kv.resident and not session.moving)
