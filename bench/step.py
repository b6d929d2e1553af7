"""Steps of the worker beside what the machine's memory and products allow.

    python -m bench step --model dummy:llama-2-7b --device cuda --floors floors.json
    python -m bench step --engine --model dummy:llama-2-7b --device cuda --floors floors.json

Decodes, tool results appended to a context, and prompts. Without ``--engine`` through the model
runner alone: `step` is from launch to result, one step after another; `device` is a step's share of
several launched ahead of each other: what is left when the host is never waited for. With it
through the engine, as it serves: decodes from token to token, the others from request to token. The
floor is the larger of two times: all bytes that must be read at the machine's copy bandwidth, and
all products at the speed of a large one.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from bench import _engine_steps, _floors, _results, _runner_steps, floors
from bench._engine_driver import EngineDriver
from bench._engine_steps import EngineBench
from bench._floors import ModelShape, Speeds, StepShape
from bench._runner_steps import RunnerBench
from services.common.errors import ConfigError
from services.worker.config import EngineConfig
from services.worker.engine.model_loader import load


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench step", description=__doc__)
    parser.add_argument("--model", default="dummy:tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--engine", action="store_true", help="through the worker's engine")
    parser.add_argument(
        "--any-model", action="store_true", help="run transformers' modules; not with --engine"
    )
    parser.add_argument("--context", type=int, default=1100)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument(
        "--host-pool-gib",
        type=float,
        default=4.0,
        help="with --engine: blocks are stored there as they fill, while it has room",
    )
    _floors.add_floors_flags(parser)
    _results.add_json_flag(parser)
    return parser


def measure_runner(
    args: argparse.Namespace, model: ModelShape, steps: Sequence[StepShape], speeds: Speeds
) -> dict[str, Any]:
    """Measures the runner and prints the table; returns what goes into the result file."""
    config = EngineConfig(model=args.model, device=args.device, dtype=args.dtype)
    loaded = load(config, lambda what, done: None)
    tokens = max(start + new for step in steps for start, new in step.parts())
    sequences = max(step.sequences for step in steps)
    bench = RunnerBench(
        loaded, model, sequences, tokens, attention=args.attention, any_model=args.any_model
    )
    rows = [bench.measure(step, speeds, args.rounds) for step in steps]
    bench.close()
    print(f"runner alone, attention {bench.runner.attention_name}; warm-up {bench.warm_up_s:.1f} s")
    _results.print_table(_runner_steps.HEADER, [_runner_steps.cells(row) for row in rows])
    return {"warm_up_s": bench.warm_up_s, "rows": [asdict(row) for row in rows]}


def measure_engine(
    args: argparse.Namespace, model: ModelShape, steps: Sequence[StepShape], speeds: Speeds
) -> dict[str, Any]:
    """Measures the engine and prints the table; returns what goes into the result file."""
    steps = [step for step in steps if step.new]
    tokens = args.context + args.rounds + 64
    sequences = max(step.sequences for step in steps)
    layout = model.chosen_layout(args.device)
    blocks = sequences * (-(-tokens // layout.block_size_tokens) + 1)
    driver = EngineDriver(
        EngineConfig(
            model=args.model,
            device=args.device,
            dtype=args.dtype,
            attention=args.attention,
            # A little more than all sequences need, so that none is evicted on the way.
            device_pool_gib=math.ceil(blocks * 1.1) * layout.block_bytes / 2**30,
            host_pool_gib=args.host_pool_gib,
            max_running_sequences=sequences,
        )
    )
    bench = EngineBench(driver, model)
    rows = [bench.measure(step, speeds, args.rounds) for step in steps]
    driver.close()
    print("through the engine")
    _results.print_table(_engine_steps.HEADER, [_engine_steps.cells(row) for row in rows])
    return {"rows": [asdict(row) for row in rows]}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    args = _parser().parse_args(argv)
    device = torch.device(args.device)
    try:
        model = _floors.model_shape(args.model, args.device, args.dtype)
        speeds = _floors.chosen_speeds(args, lambda: floors.measure(device, model.dtype))
        steps = _floors.default_steps(args.batch, args.context)
        measure = measure_engine if args.engine else measure_runner
        body = measure(args, model, steps, speeds)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    print(
        f"{args.model}, {str(model.dtype).removeprefix('torch.')}, {args.device}; floors at"
        f" {speeds.memory_bytes_per_s / 1e12:.4g} TB/s, {speeds.product_flops / 1e12:.4g} TFLOP/s"
    )
    _results.write(args, "step", args.device, {"speeds": asdict(speeds), **body})
    return 0


if __name__ == "__main__":
    sys.exit(main())
