"""Sessions of each worker in the order in which they are expected to wake."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence


class WakeOrder:
    """Sessions by worker and expected wake, of which either end can be looked at.

    Setting and removing cost a binary search and the shift of a list's tail, which for ten thousand
    sessions of one worker is a few microseconds.
    """

    def __init__(self) -> None:
        self._places: dict[str, tuple[str, float]] = {}
        self._orders: dict[str, list[tuple[float, str]]] = {}

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, session_id: object) -> bool:
        return session_id in self._places

    def set(self, session_id: str, worker_id: str, wake_s: float | None) -> None:
        """Puts a session where it belongs, in place of where it was; None: it wakes last."""
        place = (worker_id, math.inf if wake_s is None else wake_s)
        if self._places.get(session_id) == place:
            return
        self.remove(session_id)
        self._places[session_id] = place
        insort(self._orders.setdefault(worker_id, []), (place[1], session_id))

    def remove(self, session_id: str) -> None:
        """Forgets a session; does nothing if it is not there."""
        place = self._places.pop(session_id, None)
        if place is None:
            return
        worker_id, wake_s = place
        order = self._orders[worker_id]
        del order[bisect_left(order, (wake_s, session_id))]
        if not order:
            del self._orders[worker_id]

    def workers(self) -> Sequence[str]:
        """Returns the workers that have any."""
        return list(self._orders)

    def nearest(self, worker_id: str) -> Iterator[str]:
        """Yields a worker's sessions, first who wakes first; nothing may change meanwhile."""
        return (session_id for _, session_id in self._orders.get(worker_id, ()))

    def furthest(self, worker_id: str) -> Iterator[str]:
        """Yields a worker's sessions, first who wakes last; nothing may change meanwhile."""
        return (session_id for _, session_id in reversed(self._orders.get(worker_id, ())))

    def middle_s(self, worker_id: str) -> float | None:
        """Returns the median of when a worker's sessions wake; None: it has none, or no idea."""
        order = self._orders.get(worker_id)
        if not order:
            return None
        wake_s = order[len(order) // 2][0]
        return wake_s if math.isfinite(wake_s) else None
