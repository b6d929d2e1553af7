from __future__ import annotations

import argparse
import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from services import server
from services.common import gpu
from services.common.errors import ConfigError
from services.scheduler import __main__ as scheduler_main
from services.scheduler.config import SchedulerConfig
from services.worker import __main__ as worker_main
from services.worker.config import WorkerConfig

SEED = (
    "--port 5556 --gpu 0 --enable-semantic-scheduler --idle-threshold-seconds 1.0 "
    "--host-swap-pool-gb 32"
)


def parse(line: str = "") -> argparse.Namespace:
    return server.parser().parse_args(line.split())


def scheduler_config(line: str, port: int = 5556) -> SchedulerConfig:
    arguments = server.scheduler_arguments(parse(line), port)
    return scheduler_main.config_of(scheduler_main.parser().parse_args(arguments))


def worker_config(line: str, port: int = 5557, device: str = "cpu") -> WorkerConfig:
    return worker_main.parse(server.worker_arguments(parse(line), port, "127.0.0.1:5556", device))


def test_the_seeds_command_means_what_the_seed_says() -> None:
    scheduler = scheduler_config(SEED)
    worker = worker_config(SEED, device="cuda:0")

    assert (scheduler.port, scheduler.metrics_port) == (5556, 9095)
    assert (scheduler.policy, scheduler.idle_threshold_s) == ("semantic", 1.0)
    assert (worker.engine.host_pool_gib, worker.engine.device) == (32.0, "cuda:0")
    assert (worker.port, worker.metrics_port) == (5557, 9096)
    assert worker.scheduler == "127.0.0.1:5556"


@pytest.mark.parametrize(
    ("line", "policy"),
    [
        ("", "reactive-lru"),
        ("--enable-semantic-scheduler", "semantic"),
        ("--policy semantic", "semantic"),
        ("--enable-semantic-scheduler --policy semantic", "semantic"),
        ("--policy reactive-recompute", "reactive-recompute"),
    ],
)
def test_the_policy(line: str, policy: str) -> None:
    assert scheduler_config(line).policy == policy


async def test_two_policies_end_the_server_before_it_starts_anything() -> None:
    line = "--enable-semantic-scheduler --policy static"

    with pytest.raises(
        ConfigError, match=r"^--policy static: contradicts --enable-semantic-scheduler$"
    ):
        await server.run_server(parse(line), asyncio.Event())


def test_what_is_not_said_is_left_to_the_programs() -> None:
    assert scheduler_config("") == scheduler_main.config_of(
        scheduler_main.parser().parse_args(["--policy=reactive-lru"])
    )
    assert worker_config("") == worker_main.parse(["--model=smollm2", "--scheduler=127.0.0.1:5556"])


def test_what_is_said_is_handed_on() -> None:
    line = (
        "--host 0.0.0.0 --model dummy:tiny --dtype float32 --attention sdpa --seed 7 "
        "--block-size 8 --device-pool-gib 0.5 --device-memory-fraction 0.7 "
        "--max-context-length 512 --max-running-sequences 4 --max-step-tokens 128 "
        "--cpu-threads 2 --worker-id w-7 --advertise gpu-box:5557 --drain-timeout-seconds 3 "
        "--trace-file /tmp/t.jsonl --log-level debug --worker-metrics-port 0 --max-sessions 9 "
        "--session-ttl-s 0"
    )

    worker = worker_config(line, port=1234)
    scheduler = scheduler_config(line, port=4321)

    engine = worker.engine
    assert (engine.model, engine.dtype, engine.attention) == ("dummy:tiny", "float32", "sdpa")
    assert (engine.seed, engine.block_size_tokens, engine.cpu_threads) == (7, 8, 2)
    assert (engine.device_pool_gib, engine.device_memory_fraction) == (0.5, 0.7)
    assert (engine.max_context_length, engine.max_running_sequences) == (512, 4)
    assert engine.max_step_tokens == 128
    assert (worker.host, worker.port, worker.metrics_port) == ("0.0.0.0", 1234, 0)
    assert (worker.worker_id, worker.advertised_endpoint) == ("w-7", "gpu-box:5557")
    assert worker.drain_timeout_s == 3
    assert worker.telemetry == scheduler.telemetry
    assert worker.telemetry.trace_file == Path("/tmp/t.jsonl")
    assert worker.telemetry.log_level == "DEBUG"
    assert (scheduler.host, scheduler.port, scheduler.max_sessions) == ("0.0.0.0", 4321, 9)
    assert scheduler.session_ttl_s == 0


def test_every_default_shown_is_the_programs_own() -> None:
    args = vars(parse())
    worker = worker_main.parse(["--model=x"])

    assert args["worker_id"] == worker.worker_id
    assert args["drain_timeout_seconds"] == worker.drain_timeout_s
    assert (args["worker_port"], args["worker_metrics_port"]) == (worker.port, worker.metrics_port)


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


@pytest.mark.parametrize(
    "flag", ["--port", "--worker-port", "--metrics-port", "--worker-metrics-port"]
)
def test_a_port_that_is_taken_is_named_by_the_servers_own_flag(taken: int, flag: str) -> None:
    others = {"--port", "--worker-port", "--metrics-port", "--worker-metrics-port"} - {flag}
    line = " ".join(f"{other}=0" for other in others)

    with pytest.raises(ConfigError, match=rf"^{flag} {taken}: address already in use$"):
        server.check_ports(parse(f"{line} {flag}={taken}"))


def test_two_flags_with_one_port_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^--worker-port 5556: the same as --port$"):
        server.check_ports(parse("--worker-port 5556 --metrics-port 0 --worker-metrics-port 0"))


async def test_a_gpu_that_is_not_there_ends_the_server_before_it_starts_anything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu, "cuda_device_count", lambda: 1)
    ports = "--port 0 --worker-port 0 --metrics-port 0 --worker-metrics-port 0"

    with pytest.raises(ConfigError, match=r"^--gpu 4: this machine has 1 \(0 to 0\)$"):
        await server.run_server(parse(f"{ports} --gpu 4"), asyncio.Event())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--gpu -1", "argument --gpu: -1 is not a whole number of at least 0"),
        ("--host-swap-pool-gb -1", "argument --host-swap-pool-gb/--host-pool-gib: -1"),
        ("--idle-threshold-seconds nan", "nan is not a number above 0"),
        ("--port x", "argument --port: 'x' is not a port from 0 to 65535"),
    ],
)
def test_a_bad_flag_is_one_line(
    line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        server.main(line.split())

    assert caught.value.code == 2
    [error] = capsys.readouterr().err.splitlines()
    assert error.startswith("djinn-server: ")
    assert message in error


def test_what_policies_and_tenants_are_told_is_handed_on() -> None:
    config = scheduler_config(
        "--policy semantic --policy-option prefetch=off --policy-option backlog-s=2 "
        "--tenant-quota acme=3 --tenant-quota *=9"
    )
    assert (config.policy_options.prefetch, config.policy_options.backlog_s) == (False, 2.0)
    assert config.tenant_quotas == {"acme": 3, "*": 9}
