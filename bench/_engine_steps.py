"""Steps of the worker's own engine, from requests to the tokens that come out.

Decodes are timed from token to token while all sequences of the batch decode; appends and prompts
from their requests to the last first token. So the figures hold all that the step loop does.
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from dataclasses import dataclass

from bench import _floors
from bench._engine_driver import EngineDriver
from bench._floors import ModelShape, Speeds, StepShape
from services.worker.messages import ToFront, Tokens

# The engine has to learn how long such steps take before it launches them ahead.
_UNTIMED_STEPS = 12


@dataclass(frozen=True, slots=True)
class EngineRow:
    """One line of the table: medians.

    Attributes:
        shape: What was computed.
        step_ms: From token to token, or from the requests to the last first token.
        floor_ms: The least time of the step.
        ratio: ``step_ms / floor_ms``.
        idle: Share of the time in which the device waited between steps; None: not decodes.
        tokens_per_s: Of new tokens.
    """

    shape: StepShape
    step_ms: float
    floor_ms: float
    ratio: float
    idle: float | None
    tokens_per_s: float


HEADER = ("shape", "ms", "floor ms", "ratio", "idle", "tokens/s")


def cells(row: EngineRow) -> tuple[str, ...]:
    """Returns a row as it is printed under `HEADER`."""
    return (
        row.shape.name,
        f"{row.step_ms:.3f}",
        f"{row.floor_ms:.3f}",
        f"{row.ratio:.2f}",
        "" if row.idle is None else f"{row.idle:.1%}",
        f"{row.tokens_per_s:.0f}",
    )


class EngineBench:
    """Measures steps of an engine.

    Args:
        driver: The engine.
        model: Its model's shape.
    """

    def __init__(self, driver: EngineDriver, model: ModelShape) -> None:
        self._driver = driver
        self._model = model
        self._random = random.Random(0)
        self._sessions = 0

    def measure(self, shape: StepShape, speeds: Speeds, rounds: int) -> EngineRow:
        """Returns a shape's line of the table.

        Args:
            shape: What to compute; of decodes and a prompt at once nothing is known here.
            speeds: The machine's.
            rounds: Steps of decodes; a quarter as many appends or prompts.
        """
        idle = None
        if shape.new == 1:
            step_s, idle = self._decode(shape, rounds)
        else:
            times = [self._first_tokens(shape) for _ in range(max(2, rounds // 4))]
            # The first may meet something that is made on first use.
            step_s = statistics.median(times[1:])
        floor_s = _floors.step_floor_s(self._model, shape.parts(), speeds)
        return EngineRow(
            shape=shape,
            step_ms=step_s * 1e3,
            floor_ms=floor_s * 1e3,
            ratio=step_s / floor_s,
            idle=idle,
            tokens_per_s=sum(new for _, new in shape.parts()) / step_s,
        )

    def _decode(self, shape: StepShape, steps: int) -> tuple[float, float]:
        # In the middle of the measurement the contexts are as long as the shape says.
        known = shape.context - _UNTIMED_STEPS - steps // 2
        sessions = self._known(shape.sequences, max(1, known))
        self._driver.report()
        steps += _UNTIMED_STEPS
        for session in sessions:
            self._driver.submit(session, [], steps + 1)
        heard: list[Tokens] = []
        started = False

        def hear(said: list[ToFront]) -> bool:
            nonlocal started
            heard.extend(message for message in said if isinstance(message, Tokens))
            if not started and len(heard) > len(sessions) * _UNTIMED_STEPS:
                started = True
                self._driver.report()  # begins a new interval
            return len(heard) == len(sessions) * (steps + 1)

        self._driver.run(hear)
        idle = self._driver.report().step_idle_share
        self._forget(sessions)
        ends_ns = [
            _end_ns(heard[start : start + len(sessions)])
            for start in range(_UNTIMED_STEPS * len(sessions), len(heard), len(sessions))
        ]
        return statistics.median(b - a for a, b in itertools.pairwise(ends_ns)) / 1e9, idle

    def _first_tokens(self, shape: StepShape) -> float:
        """Returns how long one round of appends or prompts takes."""
        known = shape.context
        sessions = self._known(shape.sequences, known) if known else self._new(shape.sequences)
        # The token generated last has no KV yet and is computed together with what is appended.
        append = shape.new - (1 if known else 0)
        prompts = [self._tokens(append) for _ in sessions]
        start = time.perf_counter()
        for session, prompt in zip(sessions, prompts, strict=True):
            self._driver.submit(session, prompt, 1)
        self._hear_tokens(len(sessions))
        spent = time.perf_counter() - start
        self._forget(sessions)
        return spent

    def _known(self, count: int, tokens: int) -> list[str]:
        """Returns new sessions with the KV of this many tokens, and one token more."""
        sessions = self._new(count)
        for session in sessions:
            self._driver.submit(session, self._tokens(tokens), 1)
        self._hear_tokens(count)
        self._driver.run_idle()
        return sessions

    def _new(self, count: int) -> list[str]:
        self._sessions += count
        return [f"s{self._sessions - index}" for index in range(count)]

    def _tokens(self, count: int) -> list[int]:
        return self._random.choices(range(self._model.vocab_size), k=count)

    def _hear_tokens(self, count: int) -> None:
        left = count

        def hear(said: list[ToFront]) -> bool:
            nonlocal left
            left -= sum(isinstance(message, Tokens) for message in said)
            return left <= 0

        self._driver.run(hear)

    def _forget(self, sessions: list[str]) -> None:
        for session in sessions:
            self._driver.close_session(session)
        self._driver.run_idle()


def _end_ns(tokens: list[Tokens]) -> int:
    """Returns when the engine took in a step that made one token of each sequence."""
    assert len({token.request_id for token in tokens}) == len(tokens), "the batch fell apart"
    return max(token.collected_ns for token in tokens)
