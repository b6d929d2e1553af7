from __future__ import annotations

from pathlib import Path

import pytest

from services.common.config import TelemetryConfig
from services.common.errors import ConfigError
from services.scheduler.__main__ import config_of, main, parser
from services.scheduler.config import SchedulerConfig
from services.scheduler.policy.options import PolicyOptions


def parsed(*flags: str) -> SchedulerConfig:
    return config_of(parser().parse_args(flags))


def test_without_flags_the_defaults_hold():
    assert parsed() == SchedulerConfig()


def test_every_flag_is_heard():
    config = parsed(
        *("--host", "0.0.0.0", "--port", "0", "--metrics-port", "1"),
        *("--policy", "reactive-lru", "--idle-threshold-seconds", "2.5"),
        *("--command-timeout-seconds", "3", "--max-sessions", "7", "--session-ttl-s", "0"),
        *("--tenant-quota", "*=5", "--tenant-quota", "acme=2", "--max-queued", "0"),
        *("--priority-aging-seconds", "0.5"),
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
        tenant_quotas={"*": 5, "acme": 2},
        max_queued=0,
        priority_aging_s=0.5,
        session_ttl_s=0.0,
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
        (["--session-ttl-s", "-1"], "at least 0"),
        (["--pol", "semantic"], "--pol"),
        (["--tenant-quota", "acme"], "not of the form TENANT=N"),
        (["--tenant-quota", "acme=0"], "at least 1"),
        (["--max-queued", "-1"], "at least 0"),
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_code_2(flags, said, capsys):
    with pytest.raises(SystemExit) as ended:
        parsed(*flags)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--tenant-quota", "acme=8", "--max-sessions", "7"], "acme=8: more than --max-sessions 7"),
        (["--tenant-quota", "acme=8", "--tenant-quota", "acme=9"], "acme=9: given twice"),
        (["--policy-option", "prefetch"], "prefetch: not of the form name=value"),
        (["--policy", "ttl", "--policy-option", "drop=off"], "policy ttl has no such option"),
        (["--policy-option", "backlog-s=0"], "not above 0"),
    ],
)
def test_flags_that_cannot_all_be_right_are_one_line_and_exit_code_2(flags, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(flags)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_policys_options_reach_it():
    config = parsed("--policy-option", "prefetch=off", "--policy-option", "recompute-share=0.3")
    assert config.policy_options == PolicyOptions(prefetch=False, recompute_share=0.3)


def test_no_quota_of_zero_gets_into_a_configuration():
    with pytest.raises(ConfigError, match="acme=0: at least 1"):
        SchedulerConfig(tenant_quotas={"acme": 0})
