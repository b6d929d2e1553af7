"""`compare` and `sweep` on several systems: Djinn's fake server and an OpenAI-compatible one."""

import asyncio
import os
import signal

import msgspec
import pytest

from djinn_client.testing import FakeServer
from loadgen import cli, compare, config, report, service_level, sweep
from loadgen.compare import CompareOptions
from loadgen.errors import RunFileError, ServerError
from loadgen.progress import NoProgress
from loadgen.record import read_run
from loadgen.sweep import StoppedError, SweepPlan
from loadgen.systems import System
from tests.support import openai_server
from tests.support.openai_server import FakeOpenAI

WORKLOAD = """
workload:
  total_agents: 3
  arrival_rate: 50
  think_time_min: 0.01
  think_time_max: 0.02
  context_length: 20
  new_tokens: 4
"""


@pytest.fixture
def loaded():
    return config.parse(WORKLOAD, "test.yaml")


@pytest.fixture
async def systems():
    async with FakeServer() as djinn, FakeOpenAI() as peer:
        yield {
            "djinn": System(server=djinn.endpoint),
            "peer": System(target="openai", server=peer.url),
        }


async def test_one_workload_on_two_systems_is_one_comparison(loaded, systems, tmp_path):
    folder = await compare.compare(loaded, systems, CompareOptions(out=tmp_path), NoProgress())
    found = compare.load(folder)
    assert [system.name for system in found.systems] == ["djinn", "peer"]
    assert [system.target for system in found.systems] == ["djinn", "openai"]
    for system in found.systems:
        assert system.values["success_count"] == 3
        assert read_run(folder / system.run).config == loaded
        assert (folder / system.run / "report.json").exists()
    assert found.systems[1].values["swap_bytes"] is None
    assert "<svg" in compare.draw(folder, found).read_text()
    with pytest.raises(RunFileError, match="holds a comparison already"):
        await compare.compare(loaded, systems, CompareOptions(out=tmp_path), NoProgress())


def test_what_is_no_comparison_is_not_read(tmp_path):
    with pytest.raises(RunFileError, match=r"comparison\.json: No such file"):
        compare.load(tmp_path)
    (tmp_path / compare.COMPARISON_FILE).write_text("{}")
    with pytest.raises(RunFileError, match="not a comparison: Object missing"):
        compare.load(tmp_path)


async def test_a_run_that_is_done_counts_whatever_becomes_of_the_next(loaded, systems, tmp_path):
    systems = {"djinn": systems["djinn"], "gone": System(server="localhost:1")}
    with pytest.raises(ServerError, match=r"system gone: .*localhost:1"):
        await compare.compare(loaded, systems, CompareOptions(out=tmp_path), NoProgress())
    assert [system.name for system in compare.load(tmp_path).systems] == ["djinn"]


def plan(loaded, systems, level, **more):
    return SweepPlan(
        service_level=service_level.parse(level), systems=systems, config=loaded, **more
    )


async def test_a_sweep_finds_the_largest_population(loaded, systems, tmp_path):
    # As many wakes as a population of 4 has, in place of a latency.
    searched = plan(loaded, {"peer": systems["peer"]}, "failed<=0,wakes<=4")
    folder = sweep.begin(searched, tmp_path)
    found = await sweep.sweep(searched, folder, 0, NoProgress())
    assert [probe.agents for probe in found["peer"]] == [3, 6, 4, 5]
    data = msgspec.json.decode((folder / sweep.SWEEP_FILE).read_bytes())
    assert data["largest"] == {"peer": 4}
    assert report.load(folder / "peer" / "agents-000005-0").aggregates["peak_live_agents"] == 5


async def test_what_has_been_run_is_not_run_again(loaded, systems, tmp_path):
    searched = plan(loaded, {"djinn": systems["djinn"]}, "wakes<=3", repeats=2)
    await sweep.sweep(searched, sweep.begin(searched, tmp_path), 0, NoProgress())
    runs = sorted((tmp_path / "djinn").iterdir())
    times = [run.stat().st_mtime_ns for run in runs]
    assert [run.name for run in runs] == [
        "agents-000003-0",
        "agents-000003-1",
        "agents-000004-0",
        "agents-000006-0",
    ]
    # Nobody is there, nor needed.
    gone = {"djinn": System(server="localhost:1")}
    again = msgspec.structs.replace(searched, systems=gone)
    found = await sweep.sweep(again, tmp_path, 0, NoProgress())
    assert sweep.largest_of(found["djinn"]) == 3
    assert [run.stat().st_mtime_ns for run in runs] == times


async def test_a_sweep_that_was_stopped_goes_on(loaded, tmp_path):
    async with FakeServer() as djinn:
        searched = plan(loaded, {"djinn": System(server=djinn.endpoint)}, "wakes<=3")
        folder = sweep.begin(searched, tmp_path)
        djinn.hold_tokens(2)
        running = asyncio.create_task(sweep.sweep(searched, folder, 0, NoProgress()))
        await djinn.wait_until(lambda: len(djinn.requests) >= 3)
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(StoppedError):
            await running
        djinn.release_tokens()
        found = await sweep.sweep(searched, folder, 0, NoProgress())
    assert sweep.largest_of(found["djinn"]) == 3
    names = {run.name for run in (folder / "djinn").iterdir()}
    assert {"agents-000003-0", "agents-000003-0.stopped-1"} <= names


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "load.yaml").write_text(WORKLOAD)
    (tmp_path / "systems.yaml").write_text(
        f"peer:\n  target: openai\n  command: '{{python}} {openai_server.__file__} {{port}}'\n"
    )
    return tmp_path


def test_the_commands_start_and_stop_what_they_measure(folder, capsys):
    out = str(folder / "out")
    assert cli.main(["compare", "load.yaml", "--systems", "systems.yaml", "--out", out]) == 0
    printed = capsys.readouterr().out
    assert "starting peer" in printed
    assert "requests/s" in printed
    assert (folder / "out" / "comparison.svg").exists()
    level = ["--service-level", "failed<=0", "--max-agents", "3"]
    assert cli.main(["sweep", "load.yaml", "--systems", "systems.yaml:peer", *level]) == 0
    assert "peer: at most 3 agents meet failed<=0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "load.yaml", "--systems", "vllm"], "vllm: unknown system"),
        (["compare", "load.yaml", "--systems", "a=http://localhost:1"], "system a: http://local"),
        (["sweep", "load.yaml", "--service-level", "wake"], "--service-level: expected NAME<=N"),
        (
            ["sweep", "load.yaml", "--service-level", "failed<=0", "--target", "openai"],
            "--target openai needs --url",
        ),
        (
            ["sweep", "load.yaml", "--service-level", "failed<=0", "--server", "localhost:1"],
            "system djinn: ",
        ),
        (["run", "load.yaml", "--target", "openai"], "--target openai needs --url"),
        (["run", "load.yaml", "--target", "openai", "--url", "x"], "x: expected a URL such as"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(folder, capsys, arguments, message):
    assert cli.main([*arguments, "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("djinn-loadgen: ")
    assert message in error
    assert error.count("\n") == 1
