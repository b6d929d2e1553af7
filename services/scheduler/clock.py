"""The service's clock."""

from __future__ import annotations

import time


class Clock:
    """Seconds since the epoch that never jump: the wall clock's at start, then monotonic."""

    __slots__ = ("_offset_s",)

    def __init__(self) -> None:
        self._offset_s = time.time() - time.monotonic()

    def __call__(self) -> float:
        """Returns the time."""
        return time.monotonic() + self._offset_s
