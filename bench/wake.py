"""How long an agent's client waits for the first token after its tool has returned.

    python -m bench wake --model dummy:llama-2-7b --device cuda --floors floors.json
    python -m bench wake ... --resident
    python -m bench wake ... --agents 80 --new-tokens 50 --tool-s 10 20 --wakes 240

From COMPUTE sent to first token received, on the client's clock, against a djinn-server. One agent
alone on a quiet machine, time and again: it falls asleep, others use up the device pool, it wakes,
so that all of its KV is copied back (``--resident``: nobody does, so none is). With ``--agents``
many live agents whose tools take a time between the two of ``--tool-s``.

The floor is the time of the copy at the machine's load bandwidth plus one step that appends the
tool's result: as `step` has measured it (``--append-ms``), else that step's own floor. Where the
time went comes from the spans of client and server.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import djinn_client as djinn
from bench import _floors, _results, _server
from bench._floors import ModelShape, Speeds
from bench._server import Pools
from bench._wakes import Agents, Life, Wake
from djinn_client.tracing import tracer_provider
from loadgen import trace
from loadgen.errors import LoadgenError
from loadgen.metrics import distribution
from loadgen.pacer import LagProbe
from loadgen.stages import STAGES, stages_of
from services.common.errors import ConfigError

# Room for the agent that wakes and for those who overwrite its blocks.
_SESSIONS_ON_DEVICE = 8
_SESSIONS_ON_HOST = 24
_SERVER_WRITES_WITHIN_S = 1.0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench wake", description=__doc__)
    _server.add_server_flags(parser)
    parser.add_argument("--context", type=int, default=1074, help="tokens when it falls asleep")
    parser.add_argument("--append", type=int, default=32, help="tokens of the tool's result")
    parser.add_argument("--new-tokens", type=int, default=8, help="of each answer")
    parser.add_argument("--wakes", type=int, default=40, help="that are counted")
    parser.add_argument("--warm-up", type=int, default=3, help="wakes before, not counted")
    parser.add_argument("--resident", action="store_true", help="leave its blocks on the device")
    parser.add_argument("--agents", type=int, default=1, help="live at once; above 1: resident")
    parser.add_argument(
        "--tool-s",
        type=float,
        nargs=2,
        default=[0.2, 0.2],
        metavar=("LEAST", "MOST"),
        help="how long a tool takes",
    )
    parser.add_argument(
        "--append-ms", type=float, help="what `step` has measured for the step that appends"
    )
    parser.add_argument(
        "--trace-file", type=Path, help="of client and server; with --server: what it writes to"
    )
    _floors.add_floors_flags(parser)
    _results.add_json_flag(parser)
    return parser


async def run(args: argparse.Namespace, pools: Pools, trace_file: Path) -> dict[str, Any]:
    """Lets the agents wake.

    Args:
        args: The benchmark's flags.
        pools: Of a server of its own.
        trace_file: Where its spans and the client's go.

    Returns:
        The wakes, in order, and how late the client's loop ran.
    """
    provider = tracer_provider("djinn-bench", trace_file=trace_file, environ={})
    async with (
        _server.running(args, pools, trace_file) as endpoint,
        await djinn.connect(endpoint, tracer_provider=provider) as client,
    ):
        life = Life(args.context, args.append, args.new_tokens)
        agents = Agents(client, await _server.worker_of(client), life)
        probe = LagProbe(process=0)
        probe.start()
        wanted = args.warm_up + args.wakes
        if args.agents > 1:
            each = math.ceil(wanted / args.agents)
            wakes = await agents.wake_among(args.agents, each, tuple(args.tool_s))
        else:
            wakes = [
                await agents.wake_alone(overwrite=not args.resident, tool_s=args.tool_s[0])
                for _ in range(wanted)
            ]
        lag = probe.stop()
        if args.server is not None:
            # It goes on, and writes its spans in its own time.
            await asyncio.sleep(_SERVER_WRITES_WITHIN_S)
    if provider is not None:
        provider.shutdown()
    return {"wakes": wakes[args.warm_up :], "loop_lag_p99_ms": lag.p99_ms}


def floors_ms(
    model: ModelShape, speeds: Speeds, life: Life, append_ms: float | None
) -> tuple[float, float]:
    """Returns the floors of a wake whose KV is on the device, and of one whose KV is not."""
    if append_ms is None:
        append_ms = _floors.step_floor_s(model, [(life.context, life.append)], speeds) * 1e3
    return append_ms, append_ms + _floors.restore_floor_s(model, life.context, speeds) * 1e3


def latency_rows(
    wakes: Sequence[Wake], resident_floor_ms: float, moved_floor_ms: float
) -> list[dict[str, Any]]:
    """Returns the table of latencies: a row for each way in which wakes found their KV."""
    kinds = {
        "KV copied back": [wake for wake in wakes if wake.kv_bytes and not wake.recomputed_tokens],
        "KV on the device": [
            wake for wake in wakes if not wake.kv_bytes and not wake.recomputed_tokens
        ],
        "KV computed again": [wake for wake in wakes if wake.recomputed_tokens],
    }
    rows = []
    for name, found in kinds.items():
        if not found:
            continue
        spread = distribution(wake.latency_ms for wake in found)
        assert spread.p50 is not None
        floor_ms = resident_floor_ms if name == "KV on the device" else moved_floor_ms
        rows.append(
            {
                "name": name,
                "wakes": spread.count,
                "p50_ms": spread.p50,
                "p90_ms": spread.p90,
                "p99_ms": spread.p99,
                "max_ms": spread.max,
                "floor_ms": floor_ms,
                "ratio": spread.p50 / floor_ms,
                "copied_bytes": sum(wake.kv_bytes for wake in found) // len(found),
                "found_blocks": sum(wake.found_blocks for wake in found) / len(found),
            }
        )
    return rows


def stage_rows(trace_file: Path, skip: int) -> list[dict[str, Any]]:
    """Returns the table of stages.

    Args:
        trace_file: Spans of client and server.
        skip: Wakes at the beginning that are not counted.
    """
    wakes = trace.slowest_wakes(trace.read([trace_file]), count=sys.maxsize)
    wakes.sort(key=lambda spans: min(span.start_ns for span in spans))
    found = [stages for spans in wakes[skip:] if (stages := stages_of(spans)) is not None]
    total_ms = sum(stages.total_ms for stages in found)
    rows = []
    for name in (*STAGES, "unaccounted"):
        times = [float(getattr(stages, f"{name}_ms")) for stages in found]
        if not times:
            continue
        spread = distribution(times)
        rows.append(
            {
                "name": name,
                "p50_ms": spread.p50,
                "p99_ms": spread.p99,
                "ratio": sum(times) / total_ms,
            }
        )
    return rows


def _print(latencies: Sequence[dict[str, Any]], stages: Sequence[dict[str, Any]]) -> None:
    numbers = ("p50_ms", "p90_ms", "p99_ms", "max_ms", "floor_ms")
    _results.print_table(
        ("wakes", "count", "p50 ms", "p90 ms", "p99 ms", "max ms", "floor ms", "ratio", "MB"),
        [
            (
                row["name"],
                str(row["wakes"]),
                *(f"{row[name]:.2f}" for name in numbers),
                f"{row['ratio']:.2f}",
                f"{row['copied_bytes'] / 1e6:.1f}",
            )
            for row in latencies
        ],
    )
    print()
    _results.print_table(
        ("stage", "p50 ms", "p99 ms", "ratio to all"),
        [
            (
                row["name"],
                f"{row['p50_ms']:.2f}",
                f"{row['p99_ms']:.2f}",
                f"{row['ratio']:.1%}",
            )
            for row in stages
        ],
    )


def _pools(args: argparse.Namespace, model: ModelShape) -> Pools:
    tokens = args.context + args.append + 2 * args.new_tokens
    if args.agents > 1:
        wakes = math.ceil((args.wakes + args.warm_up) / args.agents)
        tokens += wakes * (args.append + args.new_tokens)
        everybody = _server.sessions_bytes(model, args.device, args.agents + 1, tokens)
        return Pools(None, everybody)
    return Pools(
        _server.sessions_bytes(model, args.device, _SESSIONS_ON_DEVICE, tokens),
        _server.sessions_bytes(model, args.device, _SESSIONS_ON_HOST, tokens),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    args = _parser().parse_args(argv)
    with contextlib.ExitStack() as stack:
        trace_file = args.trace_file
        if trace_file is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="djinn-bench-"))
            trace_file = Path(folder) / "trace.jsonl"
        try:
            model = _floors.model_shape(args.model, args.device, args.dtype)
            speeds = _floors.chosen_speeds(
                args, lambda: _floors.measured_apart(args.model, args.device)
            )
            found = asyncio.run(run(args, _pools(args, model), trace_file))
            stages = stage_rows(trace_file, args.warm_up)
        except (ConfigError, LoadgenError, djinn.DjinnError) as error:
            print(error, file=sys.stderr)
            return 2
    wakes = found["wakes"]
    life = Life(args.context, args.append, args.new_tokens)
    latencies = latency_rows(wakes, *floors_ms(model, speeds, life, args.append_ms))
    _print(latencies, stages)
    print(f"the client's loop ran late by p99 {found['loop_lag_p99_ms']:.2f} ms")
    body = {
        "speeds": asdict(speeds),
        "rows": latencies,
        "stages": stages,
        "loop_lag_p99_ms": found["loop_lag_p99_ms"],
        "wakes": [asdict(wake) for wake in wakes],
    }
    _results.write(args, "wake", args.device, body)
    return 0


if __name__ == "__main__":
    sys.exit(main())
