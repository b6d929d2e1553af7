"""A stream whose pace the test decides, so that every interleaving can be had at will."""

from __future__ import annotations

import time
from collections import deque

from services.worker.engine.streams import Event, Wakeup, Work


class ManualEvent:
    """A point in a `ManualStream`."""

    def __init__(self) -> None:
        self.reached = False
        self._reached_ns = 0

    def reach(self) -> None:
        self.reached = True
        self._reached_ns = time.time_ns()

    def query(self) -> bool:
        return self.reached

    def synchronize(self) -> None:
        assert self.reached, "the engine would block"

    def reached_ns(self) -> int:
        assert self.reached
        return self._reached_ns


class ManualStream:
    """See `Stream`: nothing happens but by `run`."""

    def __init__(self, name: str, wakeup: Wakeup) -> None:
        self.name = name
        self._wakeup = wakeup
        self._queue: deque[Work | ManualEvent | tuple[Event]] = deque()

    def launch(self, work: Work) -> None:
        self._queue.append(work)

    def wait(self, event: Event) -> None:
        self._queue.append((event,))

    def record(self, *, timed: bool = False) -> ManualEvent:
        event = ManualEvent()
        self._queue.append(event)
        return event

    def close(self) -> None:
        self._queue.clear()

    def run(self, most: int | None = None) -> int:
        """Does up to `most` pieces of work, or all; stops at an event that is not reached.

        Returns:
            Pieces of work done.
        """
        done = 0
        while self._queue and (most is None or done < most):
            item = self._queue[0]
            if isinstance(item, tuple):
                if not item[0].query():
                    break
            elif isinstance(item, ManualEvent):
                item.reach()
                self._wakeup.set()
            else:
                item()
                done += 1
            self._queue.popleft()
        while self._queue and isinstance(self._queue[0], ManualEvent):
            self._queue.popleft().reach()  # type: ignore[union-attr]
        return done
