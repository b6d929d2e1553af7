"""`djinn-worker`: serves one model to agents.

The engine process imports this module too, as the main module of a spawned process does, so what
only the front needs is imported where it is used.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio

    from services.worker.config import WorkerConfig

PROGRAM = "djinn-worker"


def parse(argv: Sequence[str] | None = None) -> WorkerConfig:
    """Returns the configuration that the command line asks for; exits with code 2 for a bad one.

    Args:
        argv: Arguments after the program's name; None: the process's own.
    """
    from services.common import flags
    from services.common.errors import InvalidRequestError
    from services.common.session_token import check_session_id
    from services.worker.config import EngineConfig, WorkerConfig

    def worker_name(text: str) -> str:
        try:
            return check_session_id(text)
        except InvalidRequestError:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not 1 to 128 characters of [A-Za-z0-9._:-]"
            ) from None

    engine = EngineConfig(model="")
    worker = WorkerConfig(engine=engine)
    parser = flags.Parser(PROGRAM, "Serve one model to agents whose KV caches sleep and wake.")
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        required=True,
        help="a folder, a hub id, smollm2, or dummy:llama-2-7b, dummy:llama-3-8b, dummy:tiny",
    )
    group.add_argument("--device", default=engine.device, help="cpu, cuda or cuda:<index>")
    group.add_argument("--dtype", default=engine.dtype, help="float32, bfloat16, float16, or auto")
    group.add_argument("--attention", default=engine.attention, help="attention backend, or auto")
    group.add_argument(
        "--seed", type=flags.non_negative_int, default=engine.seed, help="seeds random weights"
    )
    group.add_argument(
        "--cpu-threads",
        type=flags.positive_int,
        default=engine.cpu_threads,
        help="threads for CPU kernels; unset: torch's choice",
    )
    group = parser.add_argument_group("memory")
    group.add_argument(
        "--block-size",
        type=flags.non_negative_int,
        default=engine.block_size_tokens,
        help="tokens per KV block; 0: chosen for the model",
    )
    group.add_argument(
        "--device-pool-gib",
        type=flags.positive_float,
        default=engine.device_pool_gib,
        help="KV pool on the device; unset: from the device's free memory",
    )
    group.add_argument(
        "--device-memory-fraction",
        type=flags.fraction,
        default=engine.device_memory_fraction,
        help="share of the device's memory to use when --device-pool-gib is unset",
    )
    group.add_argument(
        "--host-pool-gib",
        type=flags.non_negative_float,
        default=engine.host_pool_gib,
        help="KV pool in host memory",
    )
    group.add_argument(
        "--no-write-through",
        action="store_true",
        help="copy blocks to the host only when their session is evicted",
    )
    group = parser.add_argument_group("batching")
    group.add_argument(
        "--max-context-length",
        type=flags.positive_int,
        default=engine.max_context_length,
        help="most tokens in a context; unset: the model's limit",
    )
    group.add_argument(
        "--max-running-sequences",
        type=flags.positive_int,
        default=engine.max_running_sequences,
        help="most sequences in one step",
    )
    group.add_argument(
        "--max-step-tokens",
        type=flags.positive_int,
        default=engine.max_step_tokens,
        help="most tokens in one step; longer prompts are prefilled in chunks",
    )
    group = parser.add_argument_group("service")
    group.add_argument(
        "--worker-id", type=worker_name, default=worker.worker_id, help="stable name"
    )
    group.add_argument(
        "--advertise",
        type=flags.host_port,
        metavar="HOST:PORT",
        help="where clients reach this worker; unset: the address it listens on",
    )
    group.add_argument(
        "--scheduler",
        type=flags.host_port,
        metavar="HOST:PORT",
        help="the scheduler to report to; unset: none",
    )
    group.add_argument(
        "--drain-timeout-seconds",
        type=flags.non_negative_float,
        default=worker.drain_timeout_s,
        help="how long running requests may go on after SIGTERM",
    )
    flags.add_service_flags(
        parser, port=worker.port, metrics_port=worker.metrics_port, host=worker.host
    )
    args = parser.parse_args(argv)
    return WorkerConfig(
        engine=EngineConfig(
            model=args.model,
            device=args.device,
            dtype=args.dtype,
            attention=args.attention,
            seed=args.seed,
            block_size_tokens=args.block_size,
            device_pool_gib=args.device_pool_gib,
            device_memory_fraction=args.device_memory_fraction,
            host_pool_gib=args.host_pool_gib,
            max_context_length=args.max_context_length,
            max_running_sequences=args.max_running_sequences,
            max_step_tokens=args.max_step_tokens,
            write_through=not args.no_write_through,
            cpu_threads=args.cpu_threads,
        ),
        worker_id=args.worker_id,
        host=args.host,
        port=args.port,
        advertised_endpoint=args.advertise,
        scheduler=args.scheduler,
        metrics_port=args.metrics_port,
        drain_timeout_s=args.drain_timeout_seconds,
        telemetry=flags.telemetry_config(args),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a worker; returns its exit code.

    Args:
        argv: Arguments after the program's name; None: the process's own.
    """
    from services.common import process
    from services.worker import engine_process
    from services.worker.front.app import run_front

    config = parse(argv)

    async def run(stop: asyncio.Event) -> int:
        engine = functools.partial(engine_process.main, log_level=config.telemetry.log_level)
        return await run_front(config, engine, stop, announce)

    return process.run(PROGRAM, run)


def announce(address: str) -> None:
    """Says where the worker serves, for people and for whoever started it."""
    print(f"{PROGRAM} ready on {address}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
