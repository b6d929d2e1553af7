"""Streams of work that run beside the step loop, and the events that order them.

A `Stream` does what it is given in order and at its own pace; `wait` makes it pause for another
stream's `Event`. The engine has three: compute, load and store. On a GPU they are CUDA streams. On
a CPU each is a thread, so that the same asynchronous code runs there, with the same races possible
if a wait is missing.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable
from typing import Protocol

Work = Callable[[], None]


class Event(Protocol):
    """A point in a stream."""

    def query(self) -> bool:
        """Returns True once everything launched before the event is done.

        Raises what that work raised, if it failed.
        """

    def synchronize(self) -> None:
        """Blocks until everything launched before the event is done; raises as `query` does."""

    def reached_ns(self) -> int:
        """Returns the wall clock when the event was reached; it has been, and is a timed one."""


class Stream(Protocol):
    """Work done in order, asynchronously to the caller."""

    def launch(self, work: Work) -> None:
        """Queues `work`; on a GPU it is called at once and queues kernels or copies."""

    def wait(self, event: Event) -> None:
        """Makes everything launched from here on wait for `event`, without blocking the caller."""

    def record(self, *, timed: bool = False) -> Event:
        """Returns an event for everything launched so far.

        Args:
            timed: It can say when it was reached, which takes a GPU some work.
        """

    def close(self) -> None:
        """Finishes what was launched and frees the stream."""


class Wakeup:
    """Lets another thread wake a poll on `fileno()`."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        """Returns the descriptor that becomes readable."""
        return self._fd

    def set(self) -> None:
        """Makes the descriptor readable."""
        os.eventfd_write(self._fd, 1)

    def clear(self) -> None:
        """Makes the descriptor unreadable until the next `set`."""
        try:
            os.eventfd_read(self._fd)
        except BlockingIOError:
            return

    def close(self) -> None:
        """Frees the descriptor."""
        os.close(self._fd)


class CpuEvent:
    """A point in a `CpuStream`."""

    def __init__(self) -> None:
        self._reached = threading.Event()
        self._reached_ns = 0
        self._failure: BaseException | None = None

    def query(self) -> bool:
        """See `Event.query`."""
        if not self._reached.is_set():
            return False
        self._raise()
        return True

    def synchronize(self) -> None:
        """See `Event.synchronize`."""
        self._reached.wait()
        self._raise()

    def reached_ns(self) -> int:
        """See `Event.reached_ns`."""
        return self._reached_ns

    def _raise(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _reach(self, failure: BaseException | None) -> None:
        self._failure = failure
        self._reached_ns = time.time_ns()
        self._reached.set()


class CpuStream:
    """A thread that stands in for a CUDA stream.

    A piece of work that raises fails every event recorded after it, as a CUDA error does.
    `wakeup` is set whenever an event is reached.
    """

    def __init__(self, name: str, wakeup: Wakeup) -> None:
        self._queue: queue.SimpleQueue[Work | CpuEvent | None] = queue.SimpleQueue()
        self._wakeup = wakeup
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def launch(self, work: Work) -> None:
        """See `Stream.launch`."""
        self._queue.put(work)

    def wait(self, event: Event) -> None:
        """See `Stream.wait`."""
        self._queue.put(event.synchronize)

    def record(self, *, timed: bool = False) -> CpuEvent:
        """See `Stream.record`; every event can say when it was reached."""
        event = CpuEvent()
        self._queue.put(event)
        return event

    def close(self) -> None:
        """See `Stream.close`."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if isinstance(item, CpuEvent):
                item._reach(self._failure)
                self._wakeup.set()
            elif self._failure is None:
                try:
                    item()
                except BaseException as failure:  # noqa: BLE001 - handed to whoever asks the event
                    self._failure = failure
