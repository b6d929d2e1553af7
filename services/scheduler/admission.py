"""Whether one more session is admitted now: a pure function of the system's view."""

from __future__ import annotations

from services.common.errors import ExhaustedError
from services.scheduler.domain import Phase
from services.scheduler.policy.view import SystemView

RETRY_AFTER_S = 1.0


def admit(system: SystemView, max_sessions: int | None) -> None:
    """Admits a new session.

    Args:
        system: All workers and sessions.
        max_sessions: Most sessions open at once; None: no limit.

    Raises:
        ExhaustedError: The limit is reached.
    """
    if max_sessions is None:
        return
    live = sum(system.sessions.count(phase) for phase in (Phase.OPEN, Phase.COMPUTE, Phase.IO_WAIT))
    if live >= max_sessions:
        raise ExhaustedError(
            f"{live} sessions are open and the limit is {max_sessions}",
            metadata={"limit": str(max_sessions)},
            retry_after_s=RETRY_AFTER_S,
        )
