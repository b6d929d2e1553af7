"""The worker's own engine in this process: what a front would send it goes in by call."""

from __future__ import annotations

import gc
import select
import time
from collections.abc import Callable, Sequence

from bench._kv_bench import wait_pinned
from services.worker.config import EngineConfig
from services.worker.engine.process import build
from services.worker.engine.streams import Wakeup
from services.worker.messages import Close, Command, Report, SamplingParams, Submit, ToFront


class EngineDriver:
    """An engine, built as the worker's engine process builds it, and turned as that turns it.

    Args:
        config: What to build.

    Raises:
        ConfigError: It cannot be built here.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._wakeup = Wakeup()
        self._built = build(config, self._wakeup, lambda what, done: None)
        gc.collect()
        gc.freeze()
        wait_pinned(self._built.host)
        self._requests = 0
        self._commands = 0

    def submit(self, session_id: str, append: Sequence[int], max_tokens: int) -> str:
        """Sends a request that generates greedily; returns its id."""
        self._requests += 1
        request_id = f"r{self._requests}"
        self._built.engine.handle(
            Submit(
                request_id=request_id,
                session_id=session_id,
                create=True,
                cache_salt="",
                priority=0,
                scheduler_record=b"",
                full_context=None,
                expected_context_length=None,
                append=list(append),
                sampling=SamplingParams(),
                max_tokens=max_tokens,
                stop_token_ids=[],
                logprobs=None,
                return_logits=False,
                received_ns=0,
            )
        )
        return request_id

    def close_session(self, session_id: str) -> None:
        """Ends a session, so that its blocks are free."""
        self._commands += 1
        self._built.engine.handle(Command(f"c{self._commands}", session_id, Close()))

    def run(self, hear: Callable[[list[ToFront]], bool]) -> None:
        """Lets the engine turn.

        Args:
            hear: Given what each turn says; True ends it.
        """
        while not hear(self._turn()):
            self._wait(self._built.engine.due_s)

    def run_idle(self) -> None:
        """Lets the engine turn until nothing is under way."""
        self._turn()
        while not self._built.engine.idle:
            self._wait(self._built.engine.due_s)
            self._turn()

    def report(self) -> Report:
        """Returns the engine's report on the time since the last one."""
        return self._built.engine.report()

    def close(self) -> None:
        """Ends the streams and gives the memory back."""
        for stream in self._built.streams:
            stream.close()
        self._built.host.close()
        self._wakeup.close()

    def _turn(self) -> list[ToFront]:
        engine = self._built.engine
        self._wakeup.clear()
        engine.grow_host(self._built.host.usable_blocks)
        engine.turn()
        said, engine.outbox = engine.outbox, []
        return said

    def _wait(self, due_s: float | None) -> None:
        # A GPU's events wake nobody, so there the engine is turned again at once.
        if self._built.wakes_loop:
            timeout_s = None if due_s is None else max(0.0, due_s - time.monotonic())
            select.select([self._wakeup.fileno()], [], [], timeout_s)
