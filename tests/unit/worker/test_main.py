from __future__ import annotations

import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

from services.common.config import TelemetryConfig
from services.worker.__main__ import parse
from services.worker.config import EngineConfig, WorkerConfig


def test_what_is_not_said_has_the_configurations_default() -> None:
    assert parse(["--model", "m"]) == WorkerConfig(engine=EngineConfig(model="m"))


def test_every_flag_reaches_its_field() -> None:
    line = (
        "--model m --device cuda:1 --dtype bfloat16 --attention sdpa --block-size 32 "
        "--device-pool-gib 1.5 --device-memory-fraction 0.5 --host-pool-gib 2 "
        "--max-context-length 100 --max-running-sequences 5 --max-step-tokens 60 "
        "--no-write-through --seed 7 --cpu-threads 3 --worker-id w:1 --host 0.0.0.0 --port 1 "
        "--advertise gpu:2 --scheduler head:3 --metrics-port 4 --drain-timeout-seconds 0.5 "
        "--trace-file t.jsonl --log-level debug"
    )
    assert parse(line.split()) == WorkerConfig(
        engine=EngineConfig(
            model="m",
            device="cuda:1",
            dtype="bfloat16",
            attention="sdpa",
            seed=7,
            block_size_tokens=32,
            device_pool_gib=1.5,
            device_memory_fraction=0.5,
            host_pool_gib=2.0,
            max_context_length=100,
            max_running_sequences=5,
            max_step_tokens=60,
            write_through=False,
            cpu_threads=3,
        ),
        worker_id="w:1",
        host="0.0.0.0",
        port=1,
        advertised_endpoint="gpu:2",
        scheduler="head:3",
        metrics_port=4,
        drain_timeout_s=0.5,
        telemetry=TelemetryConfig(trace_file=Path("t.jsonl"), log_level="DEBUG"),
    )


def test_the_flags_cover_the_configuration() -> None:
    # Those that have no flag on purpose.
    fixed = {"low_watermark", "report_interval_s"}
    said = parse(["--model", "m"])
    line = (
        "--model n --device d --dtype e --attention f --block-size 1 --device-pool-gib 1 "
        "--device-memory-fraction 0.1 --host-pool-gib 1 --max-context-length 1 "
        "--max-running-sequences 1 --max-step-tokens 1 --no-write-through --seed 1 "
        "--cpu-threads 1"
    )
    changed = parse(line.split())
    same = {
        field.name
        for field in fields(EngineConfig)
        if getattr(said.engine, field.name) == getattr(changed.engine, field.name)
    }
    assert same == fixed
    assert replace(changed, engine=said.engine) == said


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", ["--model"]),
        ("--model m --scheduler nowhere", ["--scheduler", "nowhere", "host:port"]),
        ("--model m --scheduler host:0", ["--scheduler", "host:0"]),
        ("--model m --advertise :5557", ["--advertise", ":5557"]),
        ("--model m --port 70000", ["--port", "70000", "65535"]),
        ("--model m --max-step-tokens 0", ["--max-step-tokens", "0"]),
        ("--model m --device-pool-gib -1", ["--device-pool-gib", "-1"]),
        ("--model m --host-pool-gib nan", ["--host-pool-gib", "nan"]),
        ("--model m --device-memory-fraction 2", ["--device-memory-fraction", "2"]),
        ("--model m --worker-id a/b", ["--worker-id", "a/b", "128"]),
        ("--model m --log-level loud", ["--log-level", "LOUD"]),
    ],
)
def test_a_bad_flag_is_one_line_and_exit_code_2(
    line: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(line.split())
    assert caught.value.code == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    for word in words:
        assert word in printed


def output_of(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_the_front_does_not_import_torch() -> None:
    program = (
        "import sys, services.worker.__main__, services.worker.front.app; "
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_engine_process_imports_nothing_of_the_front() -> None:
    program = (
        "import sys, services.worker.__main__, services.worker.engine_process; "
        "print([m for m in ('grpc', 'services.worker.front') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
