"""Commands on their way: which are in flight, which are overdue, which no longer matter.

Time is passed in. A command that is not answered by its deadline is sent again under the same id,
so that a worker which did it answers with its first result; after the last attempt it is given up.
A command that a later one supersedes is not sent again, and its result changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from services.scheduler.domain import MOVES, Action, Close, Command, CommandResult, Prefetch
from services.scheduler.timers import Timers

OnDone = Callable[[CommandResult], None]


@dataclass(slots=True)
class InFlight:
    """A command that was sent and has not ended.

    Attributes:
        sent_s: When it was first sent.
        attempts: How often it was sent.
        superseded: A later command says otherwise.
        on_done: Told once how it ended; None: nobody waits.
    """

    command: Command
    worker_id: str
    sent_s: float
    attempts: int = 1
    superseded: bool = False
    on_done: OnDone | None = None


@dataclass(frozen=True, slots=True)
class Overdue:
    """Commands whose deadline has passed: to be sent again, and given up."""

    again: tuple[InFlight, ...]
    given_up: tuple[InFlight, ...]


class Reconciler:
    """Keeps the commands in flight.

    Args:
        prefix: Makes command ids unique among scheduler processes.
        timeout_s: How long a command may take before it is sent again.
        attempts: How often a command is sent at most.
    """

    def __init__(self, prefix: str, timeout_s: float, attempts: int) -> None:
        self._prefix = prefix
        self._timeout_s = timeout_s
        self._attempts = attempts
        self._next = 0
        self._commands: dict[str, InFlight] = {}
        self._by_worker: dict[str, dict[str, None]] = {}
        self._closing: dict[tuple[str, str], int] = {}
        self._prefetching: dict[str, int] = {}
        self._timers = Timers()

    def __len__(self) -> int:
        return len(self._commands)

    def get(self, command_id: str) -> InFlight | None:
        """Returns a command in flight; None if it has ended or never was."""
        return self._commands.get(command_id)

    def begin(
        self,
        worker_id: str,
        session_id: str,
        action: Action,
        now_s: float,
        *,
        generation: int | None = None,
        traceparent: str = "",
        record: bytes | None = None,
        on_done: OnDone | None = None,
    ) -> Command:
        """Makes a command and counts it in flight; the caller sends it."""
        self._next += 1
        deadline_s = now_s + self._timeout_s
        command = Command(
            command_id=f"{self._prefix}-{self._next}",
            session_id=session_id,
            action=action,
            expected_generation=generation,
            deadline_s=deadline_s if isinstance(action, MOVES) else None,
            traceparent=traceparent,
            record=record,
        )
        self._commands[command.command_id] = InFlight(command, worker_id, now_s, on_done=on_done)
        self._by_worker.setdefault(worker_id, {})[command.command_id] = None
        if isinstance(action, Close):
            place = (worker_id, session_id)
            self._closing[place] = self._closing.get(place, 0) + 1
        if isinstance(action, Prefetch):
            self._prefetching[worker_id] = self._prefetching.get(worker_id, 0) + 1
        self._timers.set(command.command_id, deadline_s)
        return command

    def supersede(self, command_id: str) -> None:
        """Notes that a command no longer matters, unless somebody waits for it."""
        entry = self._commands.get(command_id)
        if entry is not None:
            entry.superseded = True

    def end(self, result: CommandResult) -> InFlight | None:
        """Takes in how a command ended and tells who waits for it.

        Returns:
            The command; None if it was not in flight, as with a repeated result.
        """
        entry = self._commands.pop(result.command_id, None)
        if entry is None:
            return None
        self._timers.cancel(result.command_id)
        if isinstance(entry.command.action, Close):
            place = (entry.worker_id, entry.command.session_id)
            self._closing[place] -= 1
            if not self._closing[place]:
                del self._closing[place]
        if isinstance(entry.command.action, Prefetch):
            self._prefetching[entry.worker_id] -= 1
        ids = self._by_worker[entry.worker_id]
        del ids[result.command_id]
        if not ids:
            del self._by_worker[entry.worker_id]
        if entry.on_done is not None:
            entry.on_done(result)
        return entry

    def is_closing(self, worker_id: str, session_id: str) -> bool:
        """Returns whether a Close of a session is on its way to a worker."""
        return (worker_id, session_id) in self._closing

    def prefetching(self, worker_id: str) -> int:
        """Returns how many of a worker's prefetches are in flight."""
        return self._prefetching.get(worker_id, 0)

    def of_worker(self, worker_id: str) -> list[InFlight]:
        """Returns a worker's commands in flight, in the order they were first sent."""
        return [self._commands[command_id] for command_id in self._by_worker.get(worker_id, {})]

    def renew(self, entry: InFlight, now_s: float) -> Command:
        """Gives a command in flight a new deadline; the caller sends it again."""
        deadline_s = now_s + self._timeout_s
        entry.attempts += 1
        if entry.command.deadline_s is not None:
            entry.command = replace(entry.command, deadline_s=deadline_s)
        self._timers.set(entry.command.command_id, deadline_s)
        return entry.command

    def next_s(self) -> float | None:
        """Returns when the next command is overdue; None if none is in flight."""
        return self._timers.next_s()

    def overdue(self, now_s: float) -> Overdue:
        """Returns the commands whose deadline has passed; their caller renews or ends each."""
        again: list[InFlight] = []
        given_up: list[InFlight] = []
        for command_id in self._timers.take_due(now_s):
            entry = self._commands[command_id]
            matters = not entry.superseded or entry.on_done is not None
            (again if matters and entry.attempts < self._attempts else given_up).append(entry)
        return Overdue(tuple(again), tuple(given_up))


def failed(entry: InFlight, code: str, reason: str, message: str) -> CommandResult:
    """Returns the result of a command that its worker did not answer."""
    return CommandResult(
        command_id=entry.command.command_id,
        session_id=entry.command.session_id,
        code=code,
        reason=reason,
        message=message,
    )
