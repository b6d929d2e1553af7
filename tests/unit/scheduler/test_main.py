from __future__ import annotations

from pathlib import Path

import pytest

from services.common.config import TelemetryConfig
from services.scheduler.__main__ import config_of, parser
from services.scheduler.config import SchedulerConfig


def parsed(*flags: str) -> SchedulerConfig:
    return config_of(parser().parse_args(flags))


def test_without_flags_the_defaults_hold():
    assert parsed() == SchedulerConfig()


def test_every_flag_is_heard():
    config = parsed(
        *("--host", "0.0.0.0", "--port", "0", "--metrics-port", "1"),
        *("--policy", "reactive-lru", "--idle-threshold-seconds", "2.5"),
        *("--command-timeout-seconds", "3", "--max-sessions", "7"),
        *("--trace-file", "t.jsonl", "--log-level", "debug"),
    )
    assert config == SchedulerConfig(
        host="0.0.0.0",
        port=0,
        metrics_port=1,
        policy="reactive-lru",
        idle_threshold_s=2.5,
        command_timeout_s=3.0,
        max_sessions=7,
        telemetry=TelemetryConfig(Path("t.jsonl"), "DEBUG"),
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--policy", "nope"], "nope"),
        (["--port", "70000"], "70000"),
        (["--idle-threshold-seconds", "0"], "above 0"),
        (["--idle-threshold-seconds", "nan"], "nan"),
        (["--command-timeout-seconds", "-1"], "-1"),
        (["--max-sessions", "0"], "at least 1"),
        (["--max-sessions", "many"], "many"),
        (["--pol", "semantic"], "--pol"),
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_code_2(flags, said, capsys):
    with pytest.raises(SystemExit) as ended:
        parsed(*flags)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
