"""Virtual time: what is to happen when, earliest first."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from typing import TypeVarTuple

Arguments = TypeVarTuple("Arguments")


class Events:
    """Actions by the time at which they happen.

    Actions of one moment happen in the order in which they were asked for, so that a run depends
    on nothing but its input.

    Attributes:
        now_s: The time of the action that happens now.
    """

    __slots__ = ("_asked", "_heap", "_stopped", "now_s")

    def __init__(self, start_s: float) -> None:
        self.now_s = start_s
        self._heap: list[tuple[float, int, Callable[..., object], tuple[object, ...]]] = []
        self._asked = 0
        self._stopped = False

    def __len__(self) -> int:
        return len(self._heap)

    def at(
        self,
        time_s: float,
        action: Callable[[*Arguments], object],
        *arguments: *Arguments,
    ) -> None:
        """Has `action` called with `arguments` at a time that is not past."""
        self._asked += 1
        heapq.heappush(self._heap, (time_s, self._asked, action, arguments))

    def after(
        self,
        delay_s: float,
        action: Callable[[*Arguments], object],
        *arguments: *Arguments,
    ) -> None:
        """Has `action` called in `delay_s` seconds."""
        self._asked += 1
        heapq.heappush(self._heap, (self.now_s + delay_s, self._asked, action, arguments))

    def next_s(self) -> float:
        """Returns when the next action happens; for ever, if there is none."""
        return self._heap[0][0] if self._heap else math.inf

    def run(self, until_s: float) -> int:
        """Has everything happen that comes before a time, or until `stop` is called.

        Returns:
            How many actions happened.
        """
        happened = 0
        heap, pop = self._heap, heapq.heappop
        self._stopped = False
        while heap and heap[0][0] < until_s and not self._stopped:
            self.now_s, _, action, arguments = pop(heap)
            action(*arguments)
            happened += 1
        return happened

    def stop(self) -> None:
        """Has `run` return after the present action."""
        self._stopped = True
