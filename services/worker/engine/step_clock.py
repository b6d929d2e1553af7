"""When the next step is launched behind the one that runs.

Launched too late, it leaves the device idle; launched too early, it shuts out an agent that becomes
ready meanwhile, who then waits for two steps. So it is launched a fixed lead before the running
step's end, which is foretold from earlier steps like it. Pure: every time is given by the caller.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass

_MEMORY = 0.2
# A first launch, which makes what later ones find, must not count for long.
_LAUNCHES_REMEMBERED = 5
# A slope is believed as far as the steps it was learnt from differ: by thousands of tokens.
_STEADY_TOKENS = 1000.0


@dataclass(frozen=True, slots=True)
class StepSize:
    """How much a step computes.

    Attributes:
        decodes: Sequences with one new token.
        prompt_tokens: New tokens of all others.
        kv_tokens: Tokens of KV that it attends to, of all sequences.
    """

    decodes: int
    prompt_tokens: int
    kv_tokens: int

    @property
    def kind(self) -> tuple[int, int]:
        """Steps of one kind take about as long, but for what they attend to."""
        return _size_class(self.decodes), _size_class(self.prompt_tokens)


def _size_class(count: int) -> int:
    """Returns the least of 0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32... that is not below `count`."""
    if count < 2:
        return count
    power: int = 1 << (count - 1).bit_length()
    return power * 3 // 4 if count <= power * 3 // 4 else power


class _Trend:
    """Seconds as a line over tokens of KV; older steps count for less and less.

    The least-squares line, of exponentially weighted moments and with a ridge on its slope.
    """

    def __init__(self, tokens: float, seconds: float) -> None:
        self._tokens = tokens
        self._seconds = seconds
        self._variance = 0.0
        self._covariance = 0.0

    def learn(self, tokens: float, seconds: float) -> None:
        """Takes in one more step."""
        off = tokens - self._tokens
        keep = 1 - _MEMORY
        self._covariance = keep * (self._covariance + _MEMORY * off * (seconds - self._seconds))
        self._variance = keep * (self._variance + _MEMORY * off * off)
        self._tokens += _MEMORY * off
        self._seconds += _MEMORY * (seconds - self._seconds)

    def at(self, tokens: float) -> float:
        """Returns the seconds to expect."""
        slope = max(self._covariance / (self._variance + _STEADY_TOKENS**2), 0.0)
        return max(self._seconds + slope * (tokens - self._tokens), 0.0)


@dataclass(frozen=True, slots=True)
class _Launched:
    size: StepSize
    start_s: float


class StepClock:
    """Foretells when steps end. At most two are in flight.

    Args:
        lead_s: How long before a step's end the next one is launched.
    """

    def __init__(self, lead_s: float = 1e-3) -> None:
        self._lead_s = lead_s
        self._in_flight: deque[_Launched] = deque()
        self._step_s: dict[tuple[int, int], _Trend] = {}
        self._launch_s: dict[tuple[int, int], deque[float]] = {}
        self._last_end_s = -math.inf

    def is_soon(self, wait_s: float) -> bool:
        """Returns whether a step that must wait on the device for so long may be launched now."""
        return wait_s <= self._lead_s

    def launched(self, size: StepSize, begin_s: float, end_s: float) -> None:
        """Takes in that a step was launched.

        Args:
            size: How much it computes.
            begin_s: When its launch began.
            end_s: When the launch was done.
        """
        costs = self._launch_s.setdefault(size.kind, deque(maxlen=_LAUNCHES_REMEMBERED))
        costs.append(end_s - begin_s)
        # The device begins while a long launch still goes on.
        self._in_flight.append(_Launched(size, min(end_s, begin_s + self._lead_s)))

    def ended(self, busy_s: float, now_s: float) -> None:
        """Takes in that the oldest step has ended.

        Args:
            busy_s: How long it ran.
            now_s: When its end was seen.
        """
        size = self._in_flight.popleft().size
        trend = self._step_s.get(size.kind)
        if trend is None:
            self._step_s[size.kind] = _Trend(size.kv_tokens, busy_s)
        else:
            trend.learn(size.kv_tokens, busy_s)
        self._last_end_s = now_s

    def due_s(self, next_size: StepSize) -> float | None:
        """Returns when a step may be launched, which may have passed.

        Args:
            next_size: How much it will compute.

        Returns:
            None if not before the end of the oldest step in flight: there are two, nothing is known
            of the one, or launching the next takes so long that the tokens of the one would wait.
        """
        if not self._in_flight:
            return -math.inf
        running = self._in_flight[0]
        trend = self._step_s.get(running.size.kind)
        costs = self._launch_s.get(next_size.kind)
        launch_s = statistics.median(costs) if costs else 0.0
        if len(self._in_flight) > 1 or trend is None or launch_s > self._lead_s:
            return None
        start_s = max(running.start_s, self._last_end_s)
        return start_s + trend.at(running.size.kv_tokens) - self._lead_s
