"""An engine on real streams with a model small enough to predict: what the engine's tests drive.

The model keeps each token's id as its KV and chooses the next token from every id that it *reads
back from the pool*, so one block that was reused, overwritten or read too early changes the tokens.
"""

from __future__ import annotations

import math
import select
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from services.worker.engine.block_manager import BlockManager
from services.worker.engine.engine import Engine, EngineLimits
from services.worker.engine.kv_cache import KVCache
from services.worker.engine.kv_layout import KVLayout
from services.worker.engine.kv_mover import KvMover
from services.worker.engine.sequence import Session
from services.worker.engine.step import SampledToken, SequenceSlice, StepPlan, StepResult
from services.worker.engine.step_clock import StepClock, StepSize
from services.worker.engine.streams import CpuStream, Event, Stream, Wakeup
from services.worker.engine.transfer import Transfers
from services.worker.messages import (
    Action,
    Command,
    CommandDone,
    Finished,
    Rejected,
    SamplingParams,
    Started,
    Submit,
    ToFront,
    Tokens,
)

VOCAB = 997
BLOCK = 4
POISON = VOCAB
"""A token that makes the model's logits not numbers wherever it is in the context."""


class ScrubbedReadError(Exception):
    """The model read memory that had been overwritten with NaN."""


def next_token(context: Sequence[int]) -> int:
    """Returns what the model makes of a context."""
    return sum(token * (place * 31 + 7) for place, token in enumerate(context)) % VOCAB


def continuation(context: Sequence[int], count: int) -> list[int]:
    """Returns the `count` tokens that the model generates after a context."""
    log = list(context)
    for _ in range(count):
        log.append(next_token(log))
    return log[len(context) :]


class FakeStep:
    """See `PendingStep`."""

    def __init__(self, event: Event, samples: list[SampledToken | None]) -> None:
        self._event = event
        self._samples = samples

    # A token id of -1 stands for logits that are not numbers.

    def done(self) -> bool:
        return self._event.query()

    def result(self) -> StepResult:
        self._event.synchronize()
        failed = frozenset(
            index
            for index, sample in enumerate(self._samples)
            if sample is not None and sample.token_id < 0
        )
        return StepResult(
            tuple(None if i in failed else sample for i, sample in enumerate(self._samples)), failed
        )


class FakeRunner:
    """The model; notes every plan it was given."""

    def __init__(self, cache: KVCache, compute: Stream) -> None:
        self.plans: list[StepPlan] = []
        self._kv = cache.kv
        self._compute = compute
        self._before: list[SampledToken | None] = []

    def launch(self, plan: StepPlan) -> FakeStep:
        self.plans.append(plan)
        before = self._before
        samples: list[SampledToken | None] = []
        self._before = samples
        for event in plan.after:
            self._compute.wait(event)
        self._compute.launch(
            lambda: samples.extend([self._run(part, before) for part in plan.slices])
        )
        return FakeStep(self._compute.record(), samples)

    def _run(self, part: SequenceSlice, before: list[SampledToken | None]) -> SampledToken | None:
        token_ids = part.token_ids
        if part.follows is not None:
            followed = before[part.follows]
            assert followed is not None
            token_ids = [max(followed.token_id, 0)]
        for offset, token in enumerate(token_ids):
            block, place = divmod(part.start + offset, BLOCK)
            self._kv[part.block_table[block], :, :, place] = float(token)
        if part.sample is None:
            return None
        length = part.start + len(part.token_ids)
        read = self._kv[torch.tensor(part.block_table), 0, 0].reshape(-1)[:length]
        if read.isnan().any():
            raise ScrubbedReadError(read.tolist())
        context = [int(value) for value in read]
        return SampledToken(-1 if POISON in context else next_token(context))


class TestClock(StepClock):
    """Launches steps as early as can be, or as late, as a test likes.

    Attributes:
        ahead: At once behind another, and while loads go on that they wait for on the device; else
            when nothing else runs and nothing is loaded any more.
    """

    __test__ = False

    def __init__(self) -> None:
        super().__init__()
        self.ahead = True

    def is_soon(self, wait_s: float) -> bool:
        return self.ahead

    def due_s(self, next_size: StepSize) -> float | None:
        if not self._in_flight:
            return -math.inf
        return -math.inf if self.ahead and len(self._in_flight) == 1 else None


@dataclass
class Generation:
    """What the engine said about one request."""

    started: Started | None = None
    tokens: list[int] | None = None
    finished: Finished | None = None
    rejected: Rejected | None = None


class EngineHarness:
    """Drives an engine without processes.

    Args:
        device_blocks: Device pool, in blocks of `BLOCK` tokens.
        host_blocks: Host pool.
        make_stream: Makes the streams called compute, load and store.
    """

    def __init__(
        self,
        device_blocks: int = 16,
        host_blocks: int = 64,
        *,
        max_running: int = 8,
        max_step_tokens: int = 16,
        max_context: int | None = None,
        write_through: bool = True,
        low_watermark: float = 0.0,
        ahead_bytes: int = 64 << 20,
        make_stream: Callable[[str, Wakeup], Stream] = CpuStream,
    ) -> None:
        self.wakeup = Wakeup()
        self.streams = {
            name: make_stream(name, self.wakeup) for name in ("compute", "load", "store")
        }
        layout = KVLayout(1, BLOCK, 1, 1, torch.float64)
        self.cache = KVCache(layout, device_blocks, torch.device("cpu"))
        # Whatever is read before it was written must be found out.
        self.cache.kv.fill_(float("nan"))
        self.host = torch.zeros(host_blocks * layout.block_bytes, dtype=torch.uint8)
        self.blocks = BlockManager(device_blocks, host_blocks, BLOCK)
        self.mover = KvMover(
            self.blocks,
            Transfers(self.streams["load"], self.streams["store"], ahead_bytes),
            self.cache.bytes,
            self.host,
            layout.block_bytes,
        )
        self.runner = FakeRunner(self.cache, self.streams["compute"])
        self.clock = TestClock()
        self.engine = Engine(
            self.mover,
            self.runner,
            self.streams["compute"],
            self.cache,
            EngineLimits(
                vocab_size=VOCAB + 1,
                max_context_length=max_context or device_blocks * BLOCK,
                max_running_sequences=max_running,
                max_step_tokens=max_step_tokens,
                write_through=write_through,
                low_watermark=low_watermark,
                hash_salt=b"test",
            ),
            self.clock,
        )
        self.heard: list[ToFront] = []
        self._names: Counter[str] = Counter()

    # --- saying things ---------------------------------------------------------------------------

    def submit(
        self,
        session_id: str,
        append: Sequence[int] = (),
        *,
        max_tokens: int | None = 4,
        full_context: Sequence[int] | None = None,
        expected: int | None = None,
        create: bool = True,
        stop: Sequence[int] = (),
        priority: int = 0,
    ) -> str:
        """Sends a `Submit`; returns its request id."""
        request_id = self._name("r")
        self.engine.handle(
            Submit(
                request_id=request_id,
                session_id=session_id,
                create=create,
                cache_salt="",
                priority=priority,
                scheduler_record=b"",
                full_context=None if full_context is None else list(full_context),
                expected_context_length=expected,
                append=list(append),
                sampling=SamplingParams(),
                max_tokens=max_tokens,
                stop_token_ids=list(stop),
                logprobs=None,
                return_logits=False,
                received_ns=0,
            )
        )
        return request_id

    def command(self, session_id: str, action: Action, **fields: object) -> str:
        """Sends a `Command`; returns its id."""
        command_id = self._name("c")
        self.engine.handle(Command(command_id, session_id, action, **fields))  # type: ignore[arg-type]
        return command_id

    def _name(self, prefix: str) -> str:
        self._names[prefix] += 1
        return f"{prefix}{self._names[prefix]}"

    # --- letting time pass -----------------------------------------------------------------------

    def turn(self) -> None:
        """Lets the engine take one turn and checks its bookkeeping."""
        self.wakeup.clear()
        self.engine.turn()
        self.engine.check_integrity()
        self.heard += self.engine.outbox
        self.engine.outbox = []

    def run(self, until: Callable[[], bool] | None = None) -> None:
        """Lets the engine turn until `until`, or until nothing is under way."""
        until = until or (lambda: self.engine.idle)
        self.turn()
        while not until():
            ready, _, _ = select.select([self.wakeup.fileno()], [], [], 10)
            assert ready, "the engine waits for something that never comes"
            self.turn()

    def close(self) -> None:
        """Ends the streams."""
        for stream in self.streams.values():
            stream.close()
        self.wakeup.close()

    # --- hearing things --------------------------------------------------------------------------

    def generation(self, request_id: str) -> Generation:
        """Returns what was heard about a request."""
        found = Generation(tokens=[])
        for message in self.heard:
            if getattr(message, "request_id", None) != request_id:
                continue
            if isinstance(message, Started):
                assert found.started is None
                found.started = message
            elif isinstance(message, Tokens):
                assert found.tokens is not None
                found.tokens += message.token_ids
            elif isinstance(message, Finished):
                found.finished = message
            elif isinstance(message, Rejected):
                found.rejected = message
        return found

    def done(self, command_id: str) -> CommandDone | None:
        """Returns a command's result, once it was heard."""
        for message in self.heard:
            if isinstance(message, CommandDone) and message.command_id == command_id:
                return message
        return None

    def session(self, session_id: str) -> Session:
        """Returns a session's bookkeeping."""
        return self.engine.sessions[session_id]

    def generate(self, session_id: str, append: Sequence[int], count: int = 4) -> list[int]:
        """Runs one request to its end and returns its tokens."""
        request_id = self.submit(session_id, append, max_tokens=count)
        self.run(until=lambda: self.ended(request_id))
        tokens = self.generation(request_id).tokens
        assert tokens is not None
        return tokens

    def ended(self, request_id: str) -> bool:
        """Returns True once a request has ended."""
        found = self.generation(request_id)
        return found.finished is not None or found.rejected is not None

    def carry_out(self, session_id: str, action: Action) -> CommandDone:
        """Runs one command to its end and returns its result."""
        command_id = self.command(session_id, action)
        self.run(until=lambda: self.done(command_id) is not None)
        result = self.done(command_id)
        assert result is not None
        return result
