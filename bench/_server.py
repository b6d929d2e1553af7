"""The djinn-server that a benchmark's clients talk to: one that runs, or one of its own."""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import djinn_client as djinn
from bench._floors import ModelShape
from loadgen import demo

# A client that is silent for as long as a benchmark takes is not idle.
_IDLE_THRESHOLD_S = 3600


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that `running` reads."""
    group = parser.add_argument_group("server")
    group.add_argument(
        "--server", metavar="HOST:PORT", help="one that runs; else the benchmark starts its own"
    )
    group.add_argument("--model", default="dummy:tiny")
    group.add_argument("--device", default="cpu")
    group.add_argument("--dtype", default="auto")
    group.add_argument("--device-pool-gib", type=float, help="default: what the benchmark needs")
    group.add_argument("--host-pool-gib", type=float, help="default: what the benchmark needs")
    group.add_argument(
        "--server-flag",
        action="append",
        default=[],
        metavar="FLAG",
        help="handed on to djinn-server, such as --server-flag=--cpu-threads=1; may be repeated",
    )
    group.add_argument(
        "--server-log", type=Path, default=Path("server.log"), help="where its output goes"
    )


@dataclass(frozen=True, slots=True)
class Pools:
    """Sizes of a server's pools, in bytes; None: the server's own choice."""

    device_bytes: int | None
    host_bytes: int


def sessions_bytes(model: ModelShape, device: str, sessions: int, tokens: int) -> int:
    """Returns the bytes of so many sessions' KV of so many tokens, in whole blocks."""
    layout = model.chosen_layout(device)
    return sessions * math.ceil(tokens / layout.block_size_tokens) * layout.block_bytes


def command(args: argparse.Namespace, pools: Pools, trace_file: Path | None) -> list[str]:
    """Returns the command that starts a server on ports that the system chooses.

    Args:
        args: The flags of `add_server_flags`.
        pools: Sizes where the flags give none.
        trace_file: Where its spans go.
    """
    line = [
        sys.executable,
        "-m",
        "services.server",
        f"--model={args.model}",
        f"--device={args.device}",
        f"--dtype={args.dtype}",
        "--enable-semantic-scheduler",
        f"--idle-threshold-seconds={_IDLE_THRESHOLD_S}",
        "--port=0",
        "--worker-port=0",
        "--metrics-port=0",
        "--worker-metrics-port=0",
    ]
    for flag, gib, size_bytes in (
        ("--device-pool-gib", args.device_pool_gib, pools.device_bytes),
        ("--host-pool-gib", args.host_pool_gib, pools.host_bytes),
    ):
        if gib is None and size_bytes is not None:
            # Rounded up, so that not a block is lost on the way through the flag.
            gib = math.ceil(size_bytes / 2**30 * 1e6) / 1e6
        if gib is not None:
            line.append(f"{flag}={gib:.6f}")
    if trace_file is not None:
        line.append(f"--trace-file={trace_file}")
    return line + list(args.server_flag)


@contextlib.asynccontextmanager
async def running(
    args: argparse.Namespace, pools: Pools, trace_file: Path | None = None
) -> AsyncIterator[str]:
    """Runs a server while the context lasts, unless the flags name one that runs.

    Args:
        args: The flags of `add_server_flags`.
        pools: Sizes where the flags give none.
        trace_file: Where the spans of a server of its own go.

    Yields:
        Its host:port.

    Raises:
        ServerError: It did not come up.
    """
    if args.server is not None:
        yield args.server
        return
    async with demo.server(command(args, pools, trace_file), args.server_log) as endpoint:
        yield endpoint


async def worker_of(client: djinn.Client) -> djinn.WorkerInfo:
    """Returns the server's only worker.

    Raises:
        NoWorkerError: None is connected.
    """
    workers = await client.admin.workers()
    if not workers:
        raise djinn.NoWorkerError("no worker is connected")
    return workers[0]
