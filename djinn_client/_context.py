"""The current session of a task or thread, so that a tool can signal without being handed one."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING

from djinn_client._errors import SessionClosedError
from djinn_client._types import Phase

if TYPE_CHECKING:
    from djinn_client._session import Session
    from djinn_client._signals import PhaseSignal

current: ContextVar[Session | None] = ContextVar("djinn_client_session", default=None)


def current_session() -> Session:
    """Returns the innermost session that was entered with ``async with`` in this task.

    Tasks started inside the block see it too.

    Raises:
        SessionClosedError: There is none.
    """
    session = current.get()
    if session is None:
        raise SessionClosedError("no session is current here: enter one with `async with`")
    return session


def signal_phase(
    phase: Phase | str, *, tool_name: str = "", expected_s: float | None = None
) -> PhaseSignal:
    """Tells the scheduler the phase of the current session; see `Session.signal_phase`.

    The signal is on its way when this returns; awaiting the result waits for the answer.

    Args:
        phase: ``"IO_WAIT"`` or ``"COMPUTE"``.
        tool_name: With IO_WAIT: the tool that started.
        expected_s: With IO_WAIT: seconds that the tool is expected to take.

    Raises:
        SessionClosedError: There is no current session.
        InvalidRequestError: `phase` is no phase that can be signalled, or `expected_s` is not
            above 0.
    """
    return current_session().signal_phase(phase, tool_name=tool_name, expected_s=expected_s)
