import json
import sys
from pathlib import Path

import pytest

from loadgen import cli, config, record, simulate
from loadgen.config import RunConfig
from loadgen.errors import LoadgenError
from loadgen.simulate import SimulateOptions

CONFIG = """\
workload:
  total_agents: 5
  arrival_rate: 10.0
  think_time_min: 1.0
  think_time_max: 2.0
"""
# Stands in for the scheduler: notes its flags, and leaves an empty run behind.
PROGRAM = """\
#!{python}
import json, pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
(out / "flags.json").write_text(json.dumps(sys.argv[1:]))
(out / "requests.jsonl").write_text("")
run = {{"name": "trace", "config": {{"workload": {{"replay": "x"}}}}, "config_file": "",
       "target": "simulation", "server": "", "model": {{}}, "start_unix_ns": 0}}
(out / "run.json").write_text(json.dumps(run))
sys.exit({code})
"""


@pytest.fixture
def workload() -> RunConfig:
    return config.parse(CONFIG, "w.yaml")


def program(folder: Path, code: int = 0) -> str:
    path = folder / "scheduler"
    path.write_text(PROGRAM.format(python=sys.executable, code=code))
    path.chmod(0o755)
    return str(path)


def test_the_scheduler_gets_the_trace_and_the_flags(tmp_path, workload):
    options = SimulateOptions(
        out=tmp_path / "run",
        workers=3,
        policy="ttl",
        scheduler=program(tmp_path),
        more=("--policy-option", "ttl-s=3"),
    )
    folder = simulate.run(workload, options)
    flags = json.loads((folder / "flags.json").read_text())
    trace = folder / simulate.TRACE_FILE
    assert flags[:2] == ["simulate", str(trace)]
    assert flags[4:] == [
        *("--workers", "3", "--policy", "ttl", "--leave-when-done"),
        *("--policy-option", "ttl-s=3"),
    ]
    assert len(trace.read_bytes().splitlines()) == 10
    assert record.read_run(folder).config == workload


def test_a_scheduler_that_fails_or_is_not_there_is_one_line(tmp_path, workload):
    failing = SimulateOptions(out=tmp_path / "a", scheduler=program(tmp_path, code=2))
    with pytest.raises(LoadgenError, match="simulate ended with exit code 2"):
        simulate.run(workload, failing)
    missing = SimulateOptions(out=tmp_path / "b", scheduler="no-such-program")
    with pytest.raises(LoadgenError, match="--scheduler no-such-program: no such program"):
        simulate.run(workload, missing)


def test_conversations_have_no_lengths(tmp_path):
    stories = config.parse(CONFIG + "  prompts: stories\n", "w.yaml")
    with pytest.raises(LoadgenError, match="stories have no known lengths"):
        simulate.run(stories, SimulateOptions(out=tmp_path / "run"))


def test_what_follows_two_dashes_is_passed_on(tmp_path, capsysbinary):
    path = tmp_path / "w.yaml"
    path.write_text(CONFIG)
    out = tmp_path / "run"
    arguments = ["simulate", str(path), "--out", str(out), "--scheduler", program(tmp_path)]
    cli.main([*arguments, "--set", "workload.total_agents=2", "--", "--report-seconds", "5"])
    assert json.loads((out / "flags.json").read_text())[-2:] == ["--report-seconds", "5"]
    assert record.read_run(out).overrides == {"workload.total_agents": "2"}
    capsysbinary.readouterr()


def test_export_writes_the_trace(tmp_path, capsysbinary):
    path = tmp_path / "w.yaml"
    path.write_text(CONFIG)
    assert cli.main(["export", str(path), "--seed", "3"]) == 0
    lines = capsysbinary.readouterr().out.splitlines()
    assert len(lines) == 10
    assert json.loads(lines[1])["tool"] == "tool"
