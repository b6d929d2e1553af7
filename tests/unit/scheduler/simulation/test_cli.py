from pathlib import Path

import pytest

from loadgen import record, report
from services.scheduler.__main__ import main
from services.scheduler.simulation import cli

TRACE = """\
{"timestamp": 0, "session_id": "a", "input_length": 600, "output_length": 20}
{"session_id": "a", "delay": 3000, "tool": "search", "input_length": 50, "output_length": 20}
{"timestamp": 500, "session_id": "b", "input_length": 300, "output_length": 20}
"""


@pytest.fixture
def trace(tmp_path) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text(TRACE)
    return path


def test_a_run_is_one_that_the_load_generator_reports_on(trace, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["simulate", str(trace), "--out", str(out), "--workers", "2"]) == 0
    assert "2 agents on 2 workers" in capsys.readouterr().err
    info = record.read_run(out)
    assert (info.target, info.labels, info.policy) == ("simulation", ["simulated"], "semantic")
    found = report.load(out)
    assert found.passed
    assert found.aggregates["wakes"] == 1
    assert found.aggregates["prefilled_tokens"] == 600 + 51 + 300


def test_the_schedulers_own_flags_and_parameters_are_taken(trace, tmp_path):
    out = tmp_path / "run"
    flags = ["--policy", "reactive-lru", "--params", "h200-llama-2-7b"]
    flags += ["--set", "device_pool_bytes=1e9", "--set", "step.overhead_s=0.5"]
    assert cli.main([str(trace), "--out", str(out), *flags]) == 0
    info = record.read_run(out)
    assert info.policy == "reactive-lru"
    assert info.model["parameters"]["device_pool_bytes"] == 1_000_000_000
    wake = report.load(out).aggregates["p50_wake_latency_ms"]
    assert wake is not None
    assert wake > 500


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--set", "modle=3"], "--set modle: there is no such parameter"),
        (["--set", "block_size_tokens=0"], "Expected `int` >= 1"),
        (["--params", "nothing"], "--params nothing: No such file"),
        (["--step-results", "nothing"], "nothing: not a result of bench step"),
    ],
)
def test_bad_input_is_one_line(trace, tmp_path, capsys, flags, problem):
    assert cli.main([str(trace), "--out", str(tmp_path / "run"), *flags]) == 2
    error = capsys.readouterr().err
    assert problem in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()
