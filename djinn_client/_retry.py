"""When to try again."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass

from djinn_client._errors import DeadlineExceededError, DjinnError


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long and how often a lost worker or scheduler is tried again.

    Attributes:
        give_up_s: Seconds without progress after which the error is raised; 0: at once.
        initial_s: Longest pause before the second try.
        max_s: Longest pause between two tries.
        multiplier: How much longer each pause may be than the one before, at least 1.
    """

    give_up_s: float = 60.0
    initial_s: float = 0.05
    max_s: float = 1.0
    multiplier: float = 2.0


class Deadline:
    """A moment on the monotonic clock by which something must be done."""

    def __init__(self, timeout_s: float, what: str) -> None:
        self._timeout_s = timeout_s
        self._end = time.monotonic() + timeout_s
        self._what = what
        self.last_error: DjinnError | None = None
        """Why the last try failed, unless there was progress since."""

    def error(self) -> DeadlineExceededError:
        """Returns the error of having missed it, caused by the last try's."""
        message = f"{self._what} was not done within {self._timeout_s:g} s"
        if self.last_error is not None:
            message += f"; the last try failed: {self.last_error.message}"
        error = DeadlineExceededError(message)
        error.__cause__ = self.last_error
        return error

    def remaining_s(self, most_s: float | None = None) -> float:
        """Returns the seconds left, at most `most_s`.

        Raises:
            DeadlineExceededError: None are left.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise self.error()
        return left if most_s is None else min(left, most_s)


class Backoff:
    """The pauses of one operation: exponential, bounded, with jitter.

    Jitter spreads the agents of a killed worker, so that they do not all come back at once.
    """

    def __init__(self, policy: RetryPolicy, deadline: Deadline | None = None) -> None:
        self._policy = policy
        self._deadline = deadline
        self._longest_s = policy.initial_s
        self._give_up_at = time.monotonic() + policy.give_up_s

    def progress(self) -> None:
        """Starts anew: the operation came forward."""
        self._longest_s = self._policy.initial_s
        self._give_up_at = time.monotonic() + self._policy.give_up_s
        if self._deadline is not None:
            self._deadline.last_error = None

    async def pause(self, error: DjinnError) -> None:
        """Waits before the next try.

        Args:
            error: Why the last one failed.

        Raises:
            DjinnError: `error`, if it is time to give up.
            DeadlineExceededError: The operation's own deadline would pass during the pause.
        """
        longest_s = min(self._policy.max_s, self._longest_s)
        self._longest_s = longest_s * self._policy.multiplier
        pause_s = random.uniform(longest_s / 2, longest_s)
        if error.retry_after_s is not None:
            pause_s = max(pause_s, error.retry_after_s)
        if self._deadline is not None:
            self._deadline.last_error = error
        if time.monotonic() + pause_s >= self._give_up_at:
            raise error
        if self._deadline is not None:
            pause_s = self._deadline.remaining_s(pause_s)
        await asyncio.sleep(pause_s)
