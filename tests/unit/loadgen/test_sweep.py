import io

import msgspec
import pytest
from rich.console import Console

from loadgen import service_level, sweep
from loadgen.config import Experiment, Mode, RunConfig, Workload
from loadgen.errors import RunFileError
from loadgen.sweep import Probe, SweepPlan
from loadgen.systems import System

WORKLOAD = Workload(
    total_agents=8, arrival_rate=2.0, think_time_min=1.0, think_time_max=2.0, seed=5
)
PLAN = SweepPlan(
    service_level=service_level.parse("p99_wake_ms<=250,failed<=0"),
    systems={"djinn": System(server="here:1")},
    config=RunConfig(WORKLOAD, Experiment("try")),
)


def probe(agents, wake_ms, failed=0.0):
    results = {"p99_wake_latency_ms": wake_ms, "failed_count": failed}
    checks = service_level.check(PLAN.service_level, results)
    return Probe(agents, (tuple(checks),), service_level.met(checks))


def test_each_run_has_its_population_and_all_stay_live():
    workload = sweep.probe_config(PLAN, 32, 2).workload
    assert (workload.total_agents, workload.arrival_rate, workload.seed) == (32, 2.0, 7)
    assert workload.mode is Mode.LIVE
    scaled = msgspec.structs.replace(PLAN, scale_arrivals=True)
    assert sweep.probe_config(scaled, 32, 0).workload.arrival_rate == 8.0


def test_a_folder_is_gone_on_with_for_the_same_sweep_alone(tmp_path):
    folder = tmp_path / "sweep"
    assert sweep.begin(PLAN, folder) == folder
    assert sweep.begin(PLAN, folder) == folder
    with pytest.raises(RunFileError, match="holds a sweep with another service level"):
        sweep.begin(
            msgspec.structs.replace(PLAN, service_level=service_level.parse("failed<=1")), folder
        )
    with pytest.raises(RunFileError, match="holds a sweep with another repeats"):
        sweep.begin(msgspec.structs.replace(PLAN, repeats=2), folder)
    (folder / sweep.SWEEP_FILE).write_text("{")
    with pytest.raises(RunFileError, match="not a sweep"):
        sweep.begin(PLAN, folder)


def test_the_table_says_what_met_the_level_and_the_largest():
    found = {"djinn": [probe(8, 100.0), probe(16, 300.0), probe(12, None)], "peer": [probe(1, 9e9)]}
    out = io.StringIO()
    sweep.show(PLAN, found, Console(file=out, width=120))
    text = out.getvalue()
    lines = [line.split() for line in text.splitlines()]
    assert ["djinn", "8", "100", "0", "met"] in lines
    assert ["djinn", "12", "n/a", "0", "missed"] in lines
    assert "djinn: at most 8 agents meet p99_wake_ms<=250, failed<=0" in text
    assert "peer: no population tried meets p99" in text
