"""Copies between the tiers: one at a time in each direction, the most urgent next."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from enum import IntEnum

from services.scheduler.simulation.clock import Events
from services.scheduler.simulation.kv_model import SessionKv


class Urgency(IntEnum):
    """Smaller goes first; as the worker's transfers."""

    WAKE = 0
    EVICT = 1
    PREFETCH = 2
    WRITE_THROUGH = 3


class Copy:
    """One copy of some blocks of a session.

    Attributes:
        kv: Whose blocks.
        epoch: Of them; see `SessionKv`.
        blocks: How many.
        urgency: Smaller goes first.
        start_s: When it began; 0 before.
    """

    __slots__ = ("blocks", "epoch", "kv", "start_s", "urgency")

    def __init__(self, kv: SessionKv, blocks: int, urgency: Urgency) -> None:
        self.kv = kv
        self.epoch = kv.epoch
        self.blocks = blocks
        self.urgency = urgency
        self.start_s = 0.0


class Lane:
    """One direction.

    Args:
        events: The time.
        block_bytes: Bytes of a block.
        alone_bytes_per_s: Its speed.
        shared_bytes_per_s: Its speed while the other direction is busy.
        latency_s: Before the first byte.
        on_done: Told of each copy that is done.
    """

    def __init__(
        self,
        events: Events,
        block_bytes: int,
        alone_bytes_per_s: float,
        shared_bytes_per_s: float,
        latency_s: float,
        on_done: Callable[[Copy], None],
    ) -> None:
        self._events = events
        self._block_bytes = block_bytes
        self._alone = alone_bytes_per_s
        self._shared = min(alone_bytes_per_s, shared_bytes_per_s)
        self._latency_s = latency_s
        self._on_done = on_done
        self._waiting: list[tuple[int, int, Copy]] = []
        self._submitted = 0
        self._running: Copy | None = None
        self.other: Lane | None = None

    @property
    def in_flight(self) -> int:
        """Copies that wait or run."""
        return len(self._waiting) + (self._running is not None)

    @property
    def busy(self) -> bool:
        """Whether a copy runs."""
        return self._running is not None

    def submit(self, copy: Copy) -> None:
        """Queues a copy."""
        if self._running is None:
            self._start(copy)
            return
        self._submitted += 1
        heapq.heappush(self._waiting, (copy.urgency, self._submitted, copy))

    def hasten(self, kv: SessionKv, urgency: Urgency) -> None:
        """Makes a session's copies that have not begun more urgent."""
        late = [
            place
            for place, (_, _, copy) in enumerate(self._waiting)
            if copy.kv is kv and copy.urgency > urgency
        ]
        for place in late:
            _, number, copy = self._waiting[place]
            copy.urgency = urgency
            self._waiting[place] = (urgency, number, copy)
        if late:
            heapq.heapify(self._waiting)

    def waiting(self) -> list[Copy]:
        """Returns the copies that wait or run, in no order."""
        running = [self._running] if self._running is not None else []
        return running + [copy for _, _, copy in self._waiting]

    def _start(self, copy: Copy) -> None:
        self._running = copy
        copy.start_s = self._events.now_s
        rate = self._shared if self.other is not None and self.other.busy else self._alone
        seconds = self._latency_s + copy.blocks * self._block_bytes / rate
        self._events.after(seconds, self._finish, copy)

    def _finish(self, copy: Copy) -> None:
        self._running = None
        if self._waiting:
            self._start(heapq.heappop(self._waiting)[2])
        self._on_done(copy)
