"""The scheduler's commands between its stream and the engine: each id is done once."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

from services.common.errors import DjinnError
from services.worker import messages

MAX_REMEMBERED = 8192
"""Results kept for repeated commands; far more than a scheduler has under way at a time."""


class CommandDesk:
    """Hands commands to the engine and remembers how they ended.

    Attributes:
        in_flight: Commands that the engine has, with what caused each (W3C trace context).
    """

    def __init__(
        self,
        send: Callable[[messages.ToEngine], None],
        on_done: Callable[[messages.CommandDone], None],
        *,
        clock_ns: Callable[[], int] = time.time_ns,
        remember: int = MAX_REMEMBERED,
    ) -> None:
        """Starts with nothing remembered.

        Args:
            send: Sends a message to the engine.
            on_done: Told each result once for every time it is asked for: when the command ends,
                and again when it is repeated.
            clock_ns: Wall clock.
            remember: How many results are kept, the latest used last to go.
        """
        self.in_flight: dict[str, tuple[messages.Command, str]] = {}
        self._send = send
        self._on_done = on_done
        self._clock_ns = clock_ns
        self._remember = remember
        self._results: OrderedDict[str, messages.CommandDone] = OrderedDict()

    def repeat(self, command_id: str) -> bool:
        """Answers a command that has been seen before.

        Returns:
            True if it has: its result was told again, or will be when it ends.
        """
        done = self._results.get(command_id)
        if done is not None:
            self._results.move_to_end(command_id)
            self._on_done(done)
            return True
        return command_id in self.in_flight

    def take(self, command: messages.Command, traceparent: str = "") -> None:
        """Hands a new command to the engine."""
        self.in_flight[command.command_id] = (command, traceparent)
        self._send(command)

    def refuse(self, command_id: str, session_id: str, error: DjinnError) -> None:
        """Ends a command that the engine is not given."""
        now = self._clock_ns()
        self._end(
            messages.CommandDone(
                command_id=command_id,
                session_id=session_id,
                error=error.to_info(),
                generation=0,
                kv=messages.Residency(),
                received_ns=now,
                done_ns=now,
            )
        )

    def done(self, done: messages.CommandDone) -> tuple[messages.Command, str] | None:
        """The engine has ended a command; returns what it was and what caused it."""
        known = self.in_flight.pop(done.command_id, None)
        self._end(done)
        return known

    def _end(self, done: messages.CommandDone) -> None:
        if done.command_id:
            self._results[done.command_id] = done
            self._results.move_to_end(done.command_id)
            if len(self._results) > self._remember:
                self._results.popitem(last=False)
        self._on_done(done)
