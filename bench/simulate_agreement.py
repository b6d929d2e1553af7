"""The simulator beside the server that it models: one workload, really and in virtual time.

    python -m bench simulate_agreement --model dummy:tiny --json agreement.json

First what a worker can do is measured on this machine: steps and copies as `python -m bench step
--engine` measures them. Then the workload is run on a server whose device pool holds all agents,
and simulated: by what the two differ in the gap between tokens the steps are scaled, and by what
they differ in a wake is taken for what messages cost. With these parameters the workload is
simulated on a pool that holds half of the agents, and with a real server it is run on it; printed
is what the two say of wakes, throughput and evictions. A busy machine is not the same machine
twice: the figures want a quiet one.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from bench import _results, _server, step
from bench._floors import model_shape
from loadgen import progress, report, runner, simulate
from loadgen.config import Experiment, Mode, RunConfig, Workload
from loadgen.metrics import Report
from loadgen.record import RunInfo, read_run
from loadgen.runner import RunOptions
from loadgen.simulate import SimulateOptions
from services.scheduler.simulation.parameters import (
    Latencies,
    StepTimes,
    WorkerParameters,
    rows_from_bench,
)

TARGET = 0.2
COMPARED = ("p50_wake_latency_ms", "throughput_ops_per_sec", "evictions")
# Of the time that a message costs, how it is divided; a wake is a submit and a return.
_SUBMIT_SHARE, _RETURN_SHARE, _OTHER_SHARE = 0.6, 0.4, 0.15


@dataclass(frozen=True, slots=True)
class Compared:
    """One result, really and simulated; the difference is relative to the real one."""

    name: str
    real: float
    simulated: float

    @property
    def difference(self) -> float:
        """Of the simulated from the real value; 0 if both are 0."""
        if self.real == self.simulated:
            return 0.0
        return (self.simulated - self.real) / self.real if self.real else float("inf")


def compare(
    real: Mapping[str, float | None], simulated: Mapping[str, float | None]
) -> list[Compared]:
    """Returns the results that both have, of those that are compared."""
    rows = []
    for name in COMPARED:
        first, second = real.get(name), simulated.get(name)
        if first is not None and second is not None:
            rows.append(Compared(name, first, second))
    return rows


def workload(args: argparse.Namespace) -> RunConfig:
    """Returns the workload that the flags describe."""
    return RunConfig(
        workload=Workload(
            total_agents=args.agents,
            arrival_rate=args.rate,
            think_time_min=args.think_min,
            think_time_max=args.think_max,
            iterations=args.iterations,
            context_length=args.context,
            tool_tokens=args.tool_tokens,
            new_tokens=args.new_tokens,
            mode=Mode.LIVE,
        ),
        experiment=Experiment(name="agreement"),
    )


def measured(info: RunInfo, steps: Path, args: argparse.Namespace) -> WorkerParameters:
    """Returns what a worker can do, messages and all else between two steps left out.

    Args:
        info: A run on a real server, which says what it serves and how large its pools are.
        steps: The result of the benchmark of steps.
        args: The flags.
    """
    speeds = json.loads(steps.read_text(encoding="utf-8"))["speeds"]
    block_tokens = int(info.model["block_size_tokens"])
    block_bytes = int(info.model["block_bytes"])
    token_bytes = block_bytes // block_tokens
    read = speeds["memory_bytes_per_s"]
    return WorkerParameters(
        source="measured by bench simulate_agreement",
        model=str(info.model["model"]),
        block_size_tokens=block_tokens,
        kv_bytes_per_token=token_bytes,
        device_pool_bytes=int(info.stats_after["device_total_blocks"]) * block_bytes,
        host_pool_bytes=int(info.stats_after["host_total_blocks"]) * block_bytes,
        max_context_length=int(info.model["max_context_length"]),
        max_step_tokens=args.max_step_tokens,
        load_bytes_per_s=speeds["load_bytes_per_s"],
        store_bytes_per_s=speeds["store_bytes_per_s"],
        both_ways_bytes_per_s=min(speeds["load_bytes_per_s"], speeds["store_bytes_per_s"]),
        step=StepTimes(rows=rows_from_bench(steps, token_bytes, read), kv_read_bytes_per_s=read),
    )


def fitted(
    worker: WorkerParameters, real: Mapping[str, float | None], bare: Mapping[str, float | None]
) -> WorkerParameters:
    """Returns parameters with which a simulation shows what a real run showed.

    Args:
        worker: As measured.
        real: Results of a run in which nothing was moved.
        bare: Results of its simulation with `worker`.
    """
    scale = (real["p50_itl_ms"] or 0.0) / (bare["p50_itl_ms"] or 1.0)
    rest_ms = (real["p50_wake_latency_ms"] or 0.0) - scale * (bare["p50_wake_latency_ms"] or 0.0)
    rest_s = max(0.0, rest_ms / 1e3)
    times = msgspec.structs.replace(
        worker.step,
        rows=[(count, scale * seconds) for count, seconds in worker.step.rows],
        kv_read_bytes_per_s=worker.step.kv_read_bytes_per_s / scale,
    )
    latencies = Latencies(
        signal_s=_OTHER_SHARE * rest_s,
        command_s=_OTHER_SHARE * rest_s,
        event_s=_OTHER_SHARE * rest_s,
        submit_s=_SUBMIT_SHARE * rest_s,
        return_s=_RETURN_SHARE * rest_s,
    )
    return msgspec.structs.replace(worker, step=times, latencies=latencies)


async def run_really(args: argparse.Namespace, held: int, folder: Path) -> tuple[Report, RunInfo]:
    """Runs the workload on a server whose device pool holds `held` agents."""
    model = model_shape(args.model, args.device, args.dtype)
    grown = args.context + (args.iterations + 1) * (args.tool_tokens + args.new_tokens)
    pools = _server.Pools(
        _server.sessions_bytes(model, args.device, held, grown),
        _server.sessions_bytes(model, args.device, 2 * args.agents, grown),
    )
    async with _server.running(args, pools) as server:
        options = RunOptions(server=server, out=folder, processes=1)
        await runner.run(workload(args), options, progress.NoProgress())
    return report.load(folder), read_run(folder)


def run_simulated(
    args: argparse.Namespace, worker: WorkerParameters, policy: str, folder: Path
) -> Report:
    """Simulates the workload on a worker."""
    folder.mkdir()
    params = folder / "params.json"
    params.write_bytes(msgspec.json.encode(worker))
    options = SimulateOptions(out=folder, policy=policy, params=str(params))
    return report.load(simulate.run(workload(args), options))


def measure_steps(args: argparse.Namespace, path: Path) -> None:
    """Measures steps and copies through the engine into a file."""
    line = ["--engine", "--model", args.model, "--device", args.device, "--dtype", args.dtype]
    line += ["--context", str(args.context), "--batch", "1", "2", "4", "8", "16"]
    with contextlib.redirect_stdout(io.StringIO()):
        step.main([*line, "--rounds", str(args.rounds), "--json", str(path)])


def flags() -> argparse.ArgumentParser:
    """Returns the benchmark's flags."""
    parser = argparse.ArgumentParser(
        prog="python -m bench simulate_agreement",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _server.add_server_flags(parser)
    parser.add_argument("--agents", type=int, default=24)
    parser.add_argument("--rate", type=float, default=4.0, help="arrivals per second")
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--think-min", type=float, default=2.0)
    parser.add_argument("--think-max", type=float, default=4.0)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--tool-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--max-step-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=8, help="of each step that is measured")
    _results.add_json_flag(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns 0 if the two agree."""
    args = flags().parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="djinn-agreement-") as name:
        folder = Path(name)
        steps = folder / "steps.json"
        measure_steps(args, steps)
        args.server_flag.append(f"--max-step-tokens={args.max_step_tokens}")
        still, info = asyncio.run(run_really(args, 2 * args.agents, folder / "still"))
        bare = measured(info, steps, args)
        without = run_simulated(args, bare, info.policy, folder / "bare")
        real, info = asyncio.run(run_really(args, max(1, args.agents // 2), folder / "real"))
        small = measured(info, steps, args)
        worker = fitted(small, still.aggregates, without.aggregates)
        simulated = run_simulated(args, worker, info.policy, folder / "simulated")
    rows = compare(real.aggregates, simulated.aggregates)
    _results.print_table(
        ["result", "real", "simulated", "difference"],
        [
            [row.name, f"{row.real:.4g}", f"{row.simulated:.4g}", f"{row.difference:+.1%}"]
            for row in rows
        ],
    )
    body: dict[str, Any] = {
        "parameters": msgspec.to_builtins(worker),
        "rows": [{"name": row.name, "real": row.real, "simulated": row.simulated} for row in rows],
    }
    _results.write(args, "simulate_agreement", args.device, body)
    agrees = len(rows) == len(COMPARED) and all(abs(row.difference) <= TARGET for row in rows)
    print(f"{'within' if agrees else 'not within'} {TARGET:.0%}")
    return 0 if agrees else 1


if __name__ == "__main__":
    sys.exit(main())
