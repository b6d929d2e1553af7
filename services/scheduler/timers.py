"""Points in time at which something is to be looked at, the next one first."""

from __future__ import annotations

import heapq
from collections.abc import Iterator


class Timers:
    """One point in time per key; setting, cancelling and taking the next cost O(log n).

    A key that is set again or cancelled leaves its old entry in the heap, where it is passed over
    when its time comes; when most entries are such, the heap is built anew.
    """

    __slots__ = ("_at", "_heap")

    def __init__(self) -> None:
        self._at: dict[str, float] = {}
        self._heap: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._at)

    def set(self, key: str, at_s: float) -> None:
        """Sets the key's time, in place of any it had."""
        if self._at.get(key) == at_s:
            return
        self._at[key] = at_s
        heapq.heappush(self._heap, (at_s, key))
        if len(self._heap) > 64 and len(self._heap) > 2 * len(self._at):
            self._heap = [(time_s, name) for name, time_s in self._at.items()]
            heapq.heapify(self._heap)

    def cancel(self, key: str) -> None:
        """Forgets the key's time; does nothing if it has none."""
        self._at.pop(key, None)

    def next_s(self) -> float | None:
        """Returns the earliest time set; None if there is none."""
        while self._heap:
            at_s, key = self._heap[0]
            if self._at.get(key) == at_s:
                return at_s
            heapq.heappop(self._heap)
        return None

    def take_due(self, now_s: float) -> Iterator[str]:
        """Yields and forgets the keys whose time has come, earliest first.

        A key that is set again meanwhile to a time that has come is yielded again.
        """
        while (at_s := self.next_s()) is not None and at_s <= now_s:
            _, key = heapq.heappop(self._heap)
            del self._at[key]
            yield key
