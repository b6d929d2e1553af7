"""Steps of the worker's model runner alone, launched as the engine launches them."""

from __future__ import annotations

import statistics
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bench import _floors, _streams
from bench._floors import ModelShape, Part, Speeds, StepShape
from services.worker.engine.model_loader import LoadedModel
from services.worker.engine.model_runner import ModelRunner
from services.worker.engine.step import SampleRequest, SequenceSlice, StepPlan
from services.worker.engine.streams import Wakeup
from services.worker.messages import SamplingParams

GREEDY = SamplingParams()
AHEAD = 4


@dataclass(frozen=True, slots=True)
class RunnerRow:
    """One line of the table: medians.

    Attributes:
        shape: What was computed.
        step_ms: From launch to result.
        device_ms: The same when steps are launched ahead.
        floor_ms: The least time.
        ratio: ``step_ms / floor_ms``.
        device_ratio: ``device_ms / floor_ms``.
        idle: Share of a step in which the device waits for the host.
        tokens_per_s: Of new tokens.
    """

    shape: StepShape
    step_ms: float
    device_ms: float
    floor_ms: float
    ratio: float
    device_ratio: float
    idle: float
    tokens_per_s: float


HEADER = ("shape", "step ms", "device ms", "floor ms", "ratio", "device ratio", "idle", "tokens/s")


def cells(row: RunnerRow) -> tuple[str, ...]:
    """Returns a row as it is printed under `HEADER`."""
    return (
        row.shape.name,
        f"{row.step_ms:.3f}",
        f"{row.device_ms:.3f}",
        f"{row.floor_ms:.3f}",
        f"{row.ratio:.2f}",
        f"{row.device_ratio:.2f}",
        f"{row.idle:.1%}",
        f"{row.tokens_per_s:.0f}",
    )


def make_plan(
    parts: Sequence[Part],
    tables: Sequence[Sequence[int]],
    vocab_size: int,
    generator: torch.Generator,
) -> StepPlan:
    """Returns a step as a plan, of random tokens.

    Args:
        parts: The sequences.
        tables: Block ids of each.
        vocab_size: Tokens are below it.
        generator: Draws them.
    """
    slices = []
    for index, (start, new) in enumerate(parts):
        tokens = torch.randint(vocab_size, (new,), generator=generator).tolist()
        wanted = SampleRequest(GREEDY, start + new)
        slices.append(SequenceSlice(tokens, start, array("i", tables[index]), wanted))
    return StepPlan(tuple(slices))


class RunnerBench:
    """A runner over a pool of random KV, for sequences of up to a given size.

    Args:
        loaded: The model.
        shape: The same model's shape.
        sequences: Most sequences.
        tokens: Most tokens of a sequence.
        attention: Name of the attention backend.
        any_model: Run transformers' modules.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        shape: ModelShape,
        sequences: int,
        tokens: int,
        *,
        attention: str = "auto",
        any_model: bool = False,
    ) -> None:
        layout = shape.chosen_layout(loaded.device.type)
        per_sequence = -(-tokens // layout.block_size_tokens)
        blocks = sequences * per_sequence
        pool = torch.empty(blocks, layout.block_bytes, dtype=torch.uint8, device=loaded.device)
        kv = layout.view(pool)
        for block in kv.split(64):
            block.normal_()
        self._generator = torch.Generator().manual_seed(0)
        order = torch.randperm(blocks, generator=self._generator).tolist()
        self._tables = [order[i * per_sequence :][:per_sequence] for i in range(sequences)]
        self._stream = _streams.make_stream("compute", loaded.device, Wakeup())
        self._shape = shape
        self.runner = ModelRunner(
            loaded,
            layout,
            kv,
            self._stream,
            attention=attention,
            max_running_sequences=sequences,
            any_model=any_model,
        )
        if loaded.device.type == "cuda":
            # Weights and pool were made on the default stream, which others do not wait for.
            torch.cuda.synchronize(loaded.device)
        start = time.perf_counter()
        self.runner.warm_up(lambda what, done: None)
        self.warm_up_s = time.perf_counter() - start

    def measure(self, shape: StepShape, speeds: Speeds, rounds: int) -> RunnerRow:
        """Returns a shape's line of the table."""
        parts = shape.parts()
        plan = make_plan(parts, self._tables, self._shape.vocab_size, self._generator)
        for _ in range(2):
            self.runner.launch(plan).result()
        alone = []
        for _ in range(rounds):
            start = time.perf_counter()
            self.runner.launch(plan).result()
            alone.append(time.perf_counter() - start)
        ahead = []
        for _ in range(max(1, rounds // AHEAD)):
            start = time.perf_counter()
            launched = [self.runner.launch(plan) for _ in range(AHEAD)]
            for step in launched:
                step.result()
            ahead.append((time.perf_counter() - start) / AHEAD)
        step_s, device_s = statistics.median(alone), statistics.median(ahead)
        floor_s = _floors.step_floor_s(self._shape, parts, speeds)
        return RunnerRow(
            shape=shape,
            step_ms=step_s * 1e3,
            device_ms=device_s * 1e3,
            floor_ms=floor_s * 1e3,
            ratio=step_s / floor_s,
            device_ratio=device_s / floor_s,
            idle=max(0.0, 1 - device_s / step_s),
            tokens_per_s=sum(new for _, new in parts) / step_s,
        )

    def close(self) -> None:
        """Ends the compute stream."""
        self._stream.close()
