"""``djinn-server``: a scheduler and a worker on one host, started, watched and stopped together."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
from collections.abc import Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from djinn.v1 import admin_service_pb2, admin_service_pb2_grpc
from services.common import flags, process
from services.common.errors import ConfigError
from services.common.gpu import choose_device
from services.common.logs import setup_logging
from services.common.network import check_can_listen, connectable_host, join_host_port
from services.common.supervisor import Supervisor

NAME = "djinn-server"
READY_LINE = "Djinn runtime initialized"

_SCHEDULER_STOP_S = 15.0
_WORKER_STOP_MARGIN_S = 10.0
_DRAIN_S = 10.0
_RETRY_S = 0.1
_RPC_TIMEOUT_S = 5.0

# Flags handed on to the worker as they are, if given: its defaults are the defaults.
_WORKER_FLAGS = (
    "--model",
    "--dtype",
    "--attention",
    "--seed",
    "--block-size",
    "--device-pool-gib",
    "--device-memory-fraction",
    "--max-context-length",
    "--max-running-sequences",
    "--max-step-tokens",
    "--cpu-threads",
    "--advertise",
)


def parser() -> argparse.ArgumentParser:
    """Returns the command line's parser."""
    parser = flags.Parser(
        NAME,
        "Starts a scheduler and a worker on this host and keeps them running. Prints "
        f"'{READY_LINE}' when agents can connect.",
    )
    flags.add_service_flags(parser, port=5556, metrics_port=9095)
    parser.add_argument(
        "--worker-port", type=flags.port_number, default=5557, help="the worker's gRPC port"
    )
    parser.add_argument(
        "--worker-metrics-port",
        type=flags.port_number,
        default=9096,
        help="the worker's HTTP port of /metrics",
    )
    parser.add_argument("--worker-id", default="worker-0", help="the worker's name")

    policy = parser.add_argument_group("policy")
    policy.add_argument(
        "--enable-semantic-scheduler",
        action="store_true",
        help="move KV by the phases that agents signal; without it, only when memory runs short",
    )
    policy.add_argument(
        "--policy",
        metavar="NAME",
        help="a policy by name (default: semantic with --enable-semantic-scheduler, reactive-lru "
        "without)",
    )
    policy.add_argument(
        "--idle-threshold-seconds",
        type=flags.positive_float,
        metavar="S",
        help="a session that never signals counts as idle after this long",
    )

    policy.add_argument(
        "--max-sessions",
        type=flags.positive_int,
        metavar="N",
        help="most sessions open at once; no limit if not given",
    )
    policy.add_argument(
        "--policy-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="tells the policy something, such as prefetch=off; may be given several times",
    )
    policy.add_argument(
        "--tenant-quota",
        action="append",
        default=[],
        metavar="TENANT=N",
        help="most sessions open at once of a tenant, *: of each one not named; may be given "
        "several times",
    )
    policy.add_argument(
        "--session-ttl-s",
        type=flags.non_negative_float,
        metavar="S",
        help="a session whose client gives no sign for this long is closed; 0: never",
    )

    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        default="smollm2",
        help="a local folder, a hub id, smollm2, or dummy:<shape> for random weights",
    )
    model.add_argument(
        "--gpu",
        type=flags.non_negative_int,
        metavar="N",
        help="index of the GPU; without one on this machine the CPU is used, with a warning",
    )
    model.add_argument("--device", help="cpu, cuda or cuda:<index>; overrides --gpu")
    model.add_argument("--dtype", help="element type of weights and KV, as torch names it")
    model.add_argument("--attention", metavar="BACKEND", help="attention backend")
    model.add_argument("--seed", type=int, help="seeds random weights")
    model.add_argument("--cpu-threads", type=flags.positive_int, metavar="N")
    model.add_argument("--max-context-length", type=flags.positive_int, metavar="TOKENS")
    model.add_argument("--max-running-sequences", type=flags.positive_int, metavar="N")
    model.add_argument("--max-step-tokens", type=flags.positive_int, metavar="TOKENS")

    memory = parser.add_argument_group("memory")
    memory.add_argument(
        "--host-swap-pool-gb",
        "--host-pool-gib",
        type=flags.non_negative_float,
        metavar="GIB",
        help="size of the pinned host pool in GiB; 0: none, what does not fit is recomputed",
    )
    memory.add_argument("--device-pool-gib", type=flags.positive_float, metavar="GIB")
    memory.add_argument(
        "--device-memory-fraction",
        type=flags.fraction,
        help="share of the GPU's memory to use where --device-pool-gib does not say",
    )
    memory.add_argument("--block-size", type=flags.positive_int, metavar="TOKENS")

    parser.add_argument(
        "--advertise", metavar="HOST:PORT", help="the worker's address as clients reach it"
    )
    parser.add_argument(
        "--drain-timeout-seconds",
        type=flags.non_negative_float,
        default=_DRAIN_S,
        metavar="S",
        help="how long running requests may go on after SIGTERM",
    )
    return parser


def policy_name(args: argparse.Namespace) -> str:
    """Returns the policy that the flags ask for.

    Raises:
        ConfigError: They ask for two.
    """
    if args.policy is None:
        return "semantic" if args.enable_semantic_scheduler else "reactive-lru"
    if args.enable_semantic_scheduler and args.policy != "semantic":
        raise ConfigError(f"--policy {args.policy}: contradicts --enable-semantic-scheduler")
    return str(args.policy)


def scheduler_arguments(args: argparse.Namespace, port: int) -> list[str]:
    """Returns the scheduler's arguments.

    Args:
        args: What the command line said.
        port: The port it shall listen on.
    """
    arguments = [f"--host={args.host}", f"--port={port}", f"--metrics-port={args.metrics_port}"]
    arguments += [f"--policy={policy_name(args)}", *_telemetry_arguments(args)]
    if args.idle_threshold_seconds is not None:
        arguments.append(f"--idle-threshold-seconds={args.idle_threshold_seconds}")
    if args.max_sessions is not None:
        arguments.append(f"--max-sessions={args.max_sessions}")
    arguments += [f"--policy-option={option}" for option in args.policy_option]
    arguments += [f"--tenant-quota={quota}" for quota in args.tenant_quota]
    if args.session_ttl_s is not None:
        arguments.append(f"--session-ttl-s={args.session_ttl_s}")
    return arguments


def worker_arguments(args: argparse.Namespace, port: int, scheduler: str, device: str) -> list[str]:
    """Returns the worker's arguments.

    Args:
        args: What the command line said.
        port: The port it shall listen on.
        scheduler: The scheduler's host:port.
        device: The device it shall use.
    """
    arguments = [f"--host={args.host}", f"--port={port}"]
    arguments += [f"--metrics-port={args.worker_metrics_port}", f"--worker-id={args.worker_id}"]
    arguments += [f"--scheduler={scheduler}", f"--device={device}"]
    arguments += [
        f"--drain-timeout-seconds={args.drain_timeout_seconds}",
        *_telemetry_arguments(args),
    ]
    if args.host_swap_pool_gb is not None:
        arguments.append(f"--host-pool-gib={args.host_swap_pool_gb}")
    for flag in _WORKER_FLAGS:
        value = getattr(args, flag.removeprefix("--").replace("-", "_"))
        if value is not None:
            arguments.append(f"{flag}={value}")
    return arguments


def _telemetry_arguments(args: argparse.Namespace) -> list[str]:
    arguments = [f"--log-level={args.log_level}"]
    if args.trace_file is not None:
        arguments.append(f"--trace-file={args.trace_file}")
    return arguments


def check_ports(args: argparse.Namespace) -> None:
    """Checks that all four ports can be had.

    Raises:
        ConfigError: One is taken, or two flags name the same one.
    """
    ports = {
        "--port": args.port,
        "--worker-port": args.worker_port,
        "--metrics-port": args.metrics_port,
        "--worker-metrics-port": args.worker_metrics_port,
    }
    by_port: dict[int, str] = {}
    for flag, port in ports.items():
        if port == 0:
            continue
        if port in by_port:
            raise ConfigError(f"{flag} {port}: the same as {by_port[port]}")
        by_port[port] = flag
        check_can_listen(args.host, port, flag)


async def run_server(args: argparse.Namespace, stop: asyncio.Event) -> int:
    """Runs both programs until `stop` is set or one cannot be had.

    Args:
        args: What the command line said.
        stop: Ends it.

    Returns:
        The exit code.

    Raises:
        ConfigError: A port is taken, the GPU is not there, or flags contradict each other.
    """
    setup_logging(args.log_level)
    policy = policy_name(args)
    check_ports(args)
    device = args.device
    if device is None:
        device, warning = choose_device(args.gpu)
        if warning is not None:
            say(f"warning: {warning}")
    if args.advertise is None and connectable_host(args.host) != args.host:
        say(
            f"warning: --host {args.host} does not say where agents on other machines reach the "
            "worker: give --advertise HOST:PORT"
        )
    process.adopt_orphans()

    reached = connectable_host(args.host)
    scheduler = Supervisor(
        "djinn-scheduler",
        "services.scheduler",
        lambda port: scheduler_arguments(args, port or args.port),
        stop_timeout_s=_SCHEDULER_STOP_S,
        echo=echo,
        say=say,
    )
    worker = Supervisor(
        "djinn-worker",
        "services.worker",
        lambda port: worker_arguments(
            args, port or args.worker_port, join_host_port(reached, scheduler.port or 0), device
        ),
        stop_timeout_s=args.drain_timeout_seconds + _WORKER_STOP_MARGIN_S,
        echo=echo,
        say=say,
    )

    async def run_worker() -> int:
        # It is told the scheduler's port, which may be one that the system chose.
        await scheduler.ready.wait()
        return await worker.run()

    runs = {asyncio.create_task(scheduler.run()), asyncio.create_task(run_worker())}
    announcing = asyncio.create_task(_announce(args, policy, reached, scheduler, worker))
    stopping = asyncio.create_task(stop.wait())
    tasks = {*runs, announcing, stopping}
    try:
        done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if done == {announcing}:
            announcing.result()
            await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        codes = [run.result() for run in runs if run.done()]
        if codes and not announcing.done():
            # Nobody was served yet: no drain, so that the line that says why stays the last.
            scheduler.kill()
            worker.kill()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await _stop_in_order(worker, scheduler)
    return max(codes, default=process.EXIT_OK)


async def _stop_in_order(*supervisors: Supervisor) -> None:
    # The worker first: it finishes what runs, while the scheduler still answers agents.
    try:
        for supervisor in supervisors:
            await supervisor.stop()
    finally:
        # Interrupted a second time: none is left behind.
        for supervisor in supervisors:
            supervisor.kill()


async def _announce(
    args: argparse.Namespace, policy: str, host: str, scheduler: Supervisor, worker: Supervisor
) -> None:
    """Says that Djinn is ready, once both serve and know each other."""
    while True:
        await scheduler.ready.wait()
        await worker.ready.wait()
        endpoint = join_host_port(host, scheduler.port or 0)
        try:
            await wait_serving(endpoint)
            await wait_serving(join_host_port(host, worker.port or 0))
            await wait_registered(endpoint, args.worker_id)
        except grpc.aio.AioRpcError:
            # One has died meanwhile and is being started again.
            await asyncio.sleep(_RETRY_S)
            continue
        break
    echo(f"agents connect to {endpoint} (model {args.model}, policy {policy})")
    echo(READY_LINE)


async def wait_serving(address: str) -> None:
    """Waits until the server at `address` says that it serves.

    Raises:
        grpc.aio.AioRpcError: It cannot be reached.
    """
    async with grpc.aio.insecure_channel(address) as channel:
        # Any: the published types lack Watch.
        stub: Any = health_pb2_grpc.HealthStub(channel)
        async for response in stub.Watch(health_pb2.HealthCheckRequest()):
            if response.status == health_pb2.HealthCheckResponse.SERVING:
                return


async def wait_registered(scheduler: str, worker_id: str) -> None:
    """Waits until the scheduler knows a worker.

    Args:
        scheduler: The scheduler's host:port.
        worker_id: The worker's name.

    Raises:
        grpc.aio.AioRpcError: The scheduler cannot be reached.
    """
    async with grpc.aio.insecure_channel(scheduler) as channel:
        stub = admin_service_pb2_grpc.AdminServiceStub(channel)
        while True:
            answer = await stub.ListWorkers(
                admin_service_pb2.ListWorkersRequest(), timeout=_RPC_TIMEOUT_S
            )
            if any(worker.worker_id == worker_id for worker in answer.workers):
                return
            await asyncio.sleep(_RETRY_S)


def echo(line: str) -> None:
    """Prints a line on stdout, while anybody reads it."""
    with contextlib.suppress(BrokenPipeError):
        print(line, flush=True)


def say(line: str) -> None:
    """Prints a line of djinn-server's own on stderr."""
    print(f"{NAME}: {line}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``djinn-server``.

    Args:
        argv: The arguments; None: the process's own.

    Returns:
        The exit code; `services.common.process` lists them.
    """
    args = parser().parse_args(argv)
    return process.run(NAME, lambda stop: run_server(args, stop))


if __name__ == "__main__":
    sys.exit(main())
