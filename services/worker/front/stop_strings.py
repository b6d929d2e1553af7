"""Finding stop strings in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cut:
    """What may be shown after a piece of text.

    Attributes:
        text: Text that is certain not to belong to a stop string.
        stop: The stop string that has appeared; None: none yet. `text` ends before it.
    """

    text: str
    stop: str | None = None


class StopStrings:
    """Holds back the end of a text for as long as it may become a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        """Watches for `stops`, none of them empty."""
        self._stops = tuple(stops)
        self._longest = max((len(stop) for stop in self._stops), default=0)
        self._held = ""

    def push(self, text: str) -> Cut:
        """Takes the next piece of text.

        Returns:
            What is certain now. Of several stop strings the one that begins first counts, of
            those the longest. After a cut with a stop nothing more is to be pushed.
        """
        if not self._stops:
            return Cut(text)
        held = self._held + text
        found = [(held.find(stop), -len(stop), stop) for stop in self._stops if stop in held]
        if found:
            start, _, stop = min(found)
            self._held = ""
            return Cut(held[:start], stop)
        keep = self._overlap(held)
        self._held = held[len(held) - keep :]
        return Cut(held[: len(held) - keep])

    def flush(self) -> str:
        """Returns what was held back, since no more text comes."""
        held, self._held = self._held, ""
        return held

    def _overlap(self, text: str) -> int:
        """Returns the length of the longest end of `text` that begins a stop string."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
