"""One step of the worker's model runner beside what the machine's memory and products allow.

    python -m bench step --model dummy:llama-2-7b --device cuda --json result.json

Decodes, tool results appended to a context, and prompts, launched as the engine launches them.
`step` is from launch to result, one step after another, as an engine that decides each step anew
sees it; `device` is a step's share of several launched ahead of each other: what is left when the
host is never waited for. The floor is the larger of two times: all bytes that must be read at the
measured copy bandwidth, and all products at the measured speed of a large one.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers

from services.worker.config import EngineConfig
from services.worker.engine.cuda_streams import CudaStream
from services.worker.engine.kv_layout import KVLayout
from services.worker.engine.model_loader import LoadedModel, load
from services.worker.engine.model_runner import ModelRunner
from services.worker.engine.sizing import choose_block_size
from services.worker.engine.step import SampleRequest, SequenceSlice, StepPlan
from services.worker.engine.streams import CpuStream, Stream, Wakeup
from services.worker.messages import SamplingParams

GREEDY = SamplingParams()
AHEAD = 4


@dataclass(frozen=True, slots=True)
class Shape:
    """What a step computes.

    Attributes:
        name: For the table.
        sequences: How many.
        context: Tokens of each that were computed before.
        new: Tokens of each that the step computes.
    """

    name: str
    sequences: int
    context: int
    new: int


@dataclass(frozen=True, slots=True)
class Speeds:
    """What the machine does at best.

    Attributes:
        bytes_per_s: Device memory, bytes read plus bytes written of a large copy.
        flops: Floating-point operations per second of a large product in the model's dtype.
    """

    bytes_per_s: float
    flops: float


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: medians.

    Attributes:
        step_ms: From launch to result.
        device_ms: The same when steps are launched ahead.
        floor_ms: See the module.
        ratio: ``step_ms / floor_ms``.
        device_ratio: ``device_ms / floor_ms``.
        idle: Share of a step in which the device waits for the host.
        tokens_per_s: Of new tokens.
    """

    shape: Shape
    step_ms: float
    device_ms: float
    floor_ms: float
    ratio: float
    device_ratio: float
    idle: float
    tokens_per_s: float


def default_shapes(batches: Sequence[int], context: int) -> list[Shape]:
    """Returns the shapes to measure.

    Args:
        batches: Of the decodes.
        context: Tokens before each decode.
    """
    shapes = [Shape(f"decode {count}", count, context, 1) for count in batches]
    known = max(context - 26, 1)
    shapes += [Shape(f"append 32 to {known} x{count}", count, known, 32) for count in (1, 8)]
    prompt = min(context, 1024)
    shapes += [Shape(f"prefill {prompt} x{count}", count, 0, prompt) for count in (1, 4)]
    decodes = max(batches) // 2
    if decodes:
        # The prompt is the last; see `make_plan`.
        shapes.append(Shape(f"decode {decodes} + 256 of a prompt", decodes + 1, context, 0))
    return shapes


def floor_s(loaded: LoadedModel, plan: StepPlan, speeds: Speeds) -> float:
    """Returns the least time a step can take.

    Args:
        loaded: The model.
        plan: What the step computes.
        speeds: Of the machine.
    """
    embedding = loaded.model.get_input_embeddings().weight
    tied = loaded.model.get_output_embeddings().weight is embedding
    parameters = sum(weight.numel() for weight in loaded.model.parameters())
    read = parameters - (0 if tied else embedding.numel())
    heads = loaded.num_query_heads * loaded.head_dim
    token_bytes = 2 * loaded.num_layers * loaded.num_kv_heads * loaded.head_dim
    total_bytes = float(read)
    flops = 0.0
    head = loaded.vocab_size * embedding.shape[1]
    for part in plan.slices:
        new, end = len(part.token_ids), part.start + len(part.token_ids)
        total_bytes += token_bytes * end
        pairs = new * part.start + new * (new + 1) / 2
        flops += 2.0 * (read - head) * new + 2.0 * head
        flops += 4.0 * heads * pairs * loaded.num_layers
    return max(total_bytes * loaded.dtype.itemsize / speeds.bytes_per_s, flops / speeds.flops)


def measure_speeds(device: torch.device, dtype: torch.dtype) -> Speeds:
    """Measures a large copy and a large product."""
    gpu = device.type == "cuda"
    size = (2 << 30) if gpu else (32 << 20)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = _median(lambda: target.copy_(source), device, 10)
    width = 8192 if gpu else 512
    left = torch.randn(width, width, device=device).to(dtype)
    right = torch.randn(width, width, device=device).to(dtype)
    product_s = _median(lambda: left @ right, device, 10)
    return Speeds(2 * size / copy_s, 2.0 * width**3 / product_s)


def _median(work: Callable[[], object], device: torch.device, rounds: int) -> float:
    times = []
    for _ in range(rounds + 2):
        _finish(device)
        start = time.perf_counter()
        work()
        _finish(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def make_plan(
    shape: Shape, tables: Sequence[Sequence[int]], vocab_size: int, generator: torch.Generator
) -> StepPlan:
    """Returns a shape as a plan, of random tokens.

    Args:
        shape: `new` of 0 stands for decodes and, last, 256 tokens of a prompt.
        tables: Block ids of each sequence.
        vocab_size: Tokens are below it.
        generator: Draws them.
    """
    slices = []
    for index in range(shape.sequences):
        start, new = shape.context, shape.new
        if new == 0:
            last = index + 1 == shape.sequences
            start, new = (0, min(256, start)) if last else (start, 1)
        tokens = torch.randint(vocab_size, (new,), generator=generator).tolist()
        wanted = SampleRequest(GREEDY, start + new)
        slices.append(SequenceSlice(tokens, start, array("i", tables[index]), wanted))
    return StepPlan(tuple(slices))


class Bench:
    """A runner over a pool of random KV, for sequences of up to a given size.

    Args:
        loaded: The model.
        sequences: Most sequences.
        tokens: Most tokens of a sequence.
        attention: Name of the attention backend.
        any_model: Run transformers' modules.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        sequences: int,
        tokens: int,
        *,
        attention: str = "auto",
        any_model: bool = False,
    ) -> None:
        one = KVLayout(loaded.num_layers, 1, loaded.num_kv_heads, loaded.head_dim, loaded.dtype)
        config = EngineConfig(model=loaded.name, device=loaded.device.type)
        size = choose_block_size(config, one.token_bytes)
        layout = KVLayout(
            loaded.num_layers, size, loaded.num_kv_heads, loaded.head_dim, loaded.dtype
        )
        per_sequence = -(-tokens // size)
        blocks = sequences * per_sequence
        pool = torch.empty(blocks, layout.block_bytes, dtype=torch.uint8, device=loaded.device)
        kv = layout.view(pool)
        for block in kv.split(64):
            block.normal_()
        self._generator = torch.Generator().manual_seed(0)
        order = torch.randperm(blocks, generator=self._generator).tolist()
        self._tables = [order[i * per_sequence :][:per_sequence] for i in range(sequences)]
        self._stream: Stream = (
            CudaStream(loaded.device)
            if loaded.device.type == "cuda"
            else CpuStream("compute", Wakeup())
        )
        self._loaded = loaded
        self.runner = ModelRunner(
            loaded,
            layout,
            kv,
            self._stream,
            attention=attention,
            max_running_sequences=sequences,
            any_model=any_model,
        )
        start = time.perf_counter()
        self.runner.warm_up(lambda what, done: None)
        self.warm_up_s = time.perf_counter() - start

    def measure(self, shape: Shape, speeds: Speeds, rounds: int) -> Row:
        """Returns a shape's line of the table."""
        plan = make_plan(shape, self._tables, self._loaded.vocab_size, self._generator)
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
        floor = floor_s(self._loaded, plan, speeds)
        new = sum(len(part.token_ids) for part in plan.slices)
        return Row(
            shape=shape,
            step_ms=step_s * 1e3,
            device_ms=device_s * 1e3,
            floor_ms=floor * 1e3,
            ratio=step_s / floor,
            device_ratio=device_s / floor,
            idle=max(0.0, 1 - device_s / step_s),
            tokens_per_s=new / step_s,
        )

    def close(self) -> None:
        """Ends the compute stream."""
        self._stream.close()


def print_table(rows: Sequence[Row]) -> None:
    """Prints the table."""
    print(
        f"{'shape':30} {'step ms':>9} {'device ms':>9} {'floor ms':>9}"
        f" {'ratio':>6} {'dev.':>6} {'idle':>6} {'tokens/s':>9}"
    )
    for row in rows:
        print(
            f"{row.shape.name:30} {row.step_ms:9.3f} {row.device_ms:9.3f} {row.floor_ms:9.3f}"
            f" {row.ratio:6.2f} {row.device_ratio:6.2f} {row.idle:6.1%} {row.tokens_per_s:9.0f}"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench step", description=__doc__)
    parser.add_argument("--model", default="dummy:tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--any-model", action="store_true", help="run transformers' modules")
    parser.add_argument("--context", type=int, default=1100)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--bandwidth-tb-s", type=float, help="instead of measuring it")
    parser.add_argument("--tflops", type=float, help="instead of measuring it")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    config = EngineConfig(model=args.model, device=args.device, dtype=args.dtype)
    loaded = load(config, lambda what, done: None)
    measured = measure_speeds(loaded.device, loaded.dtype)
    speeds = Speeds(
        args.bandwidth_tb_s * 1e12 if args.bandwidth_tb_s else measured.bytes_per_s,
        args.tflops * 1e12 if args.tflops else measured.flops,
    )
    shapes = default_shapes(args.batch, args.context)
    tokens = max(shape.context + max(shape.new, 1) for shape in shapes)
    sequences = max(shape.sequences for shape in shapes)
    bench = Bench(loaded, sequences, tokens, attention=args.attention, any_model=args.any_model)
    rows = [bench.measure(shape, speeds, args.rounds) for shape in shapes]
    bench.close()
    print(
        f"{args.model}, {str(loaded.dtype).removeprefix('torch.')}, {loaded.device.type},"
        f" attention {bench.runner.attention_name}; copy {measured.bytes_per_s / 1e12:.2f} TB/s,"
        f" product {measured.flops / 1e12:.1f} TFLOP/s; warm-up {bench.warm_up_s:.1f} s"
    )
    print_table(rows)
    if args.json is not None:
        result = {
            "benchmark": "step",
            "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
            "machine": {
                "device": torch.cuda.get_device_name(loaded.device)
                if loaded.device.type == "cuda"
                else platform.processor() or platform.machine(),
                "measured": asdict(measured),
            },
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "warm_up_s": bench.warm_up_s,
            "rows": [asdict(row) for row in rows],
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
