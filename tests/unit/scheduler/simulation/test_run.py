from pathlib import Path

import msgspec
import pytest

from services.scheduler.config import SchedulerConfig
from services.scheduler.simulation.result import RunFolder, ToolRecord
from services.scheduler.simulation.run import Options, Simulation
from services.scheduler.simulation.trace import TracedAgent, TracedStep
from tests.support.simulated import (
    agents_of,
    population,
    requests_of,
    simulate,
    worker_parameters,
)


def test_one_agent_alone_wakes_after_one_load_and_one_step():
    agents = [TracedAgent("a", 1.0, "", 0, False, [TracedStep(512, 8), TracedStep(32, 8, "t", 5)])]
    simulation, summary = simulate(agents, worker_parameters())
    reason, reflect = requests_of(simulation)
    assert reason.scheduled_s == 1.0
    assert reflect.compute_s is not None
    assert reflect.compute_s == pytest.approx(reason.end_s + 5, abs=1e-5)
    # Nobody needed the room: found on the device. Messages 2.5 ms, a step of 33 tokens 5.5 ms.
    assert reflect.first_token_s is not None
    assert reflect.first_token_s - reflect.compute_s == pytest.approx(0.0081, abs=3e-4)
    assert reflect.kv is not None
    assert reflect.kv.loaded_blocks == 0
    assert summary.virtual_s == pytest.approx(reflect.end_s, abs=1e-3)


def write(folder: Path) -> bytes:
    files = RunFolder(folder)
    parameters = worker_parameters(150, 300)
    agents = population(40, 2)
    simulation = Simulation(agents, SchedulerConfig(), parameters, Options(workers=2), files)
    simulation.run()
    files.finish({})
    return (folder / "requests.jsonl").read_bytes()


def test_the_same_input_gives_the_same_bytes(tmp_path):
    first = write(tmp_path / "first")
    assert first == write(tmp_path / "second")
    assert first.count(b'"event":"request"') == 40 * 3


def test_a_burst_returns_at_the_period(tmp_path):
    steps = [TracedStep(100, 5), TracedStep(10, 5, "t", 3.0, 30.0)]
    agents = [TracedAgent(f"a{i}", float(i), "", 0, False, steps) for i in range(5)]
    simulation, _ = simulate(agents, worker_parameters())
    ends = {r.end_s for r in simulation.records if isinstance(r, ToolRecord)}
    assert ends == {30.0}


def test_agents_that_abandon_their_session_never_close_it():
    stays = TracedAgent("stays", 0.0, "", 0, True, [TracedStep(100, 5)])
    goes = TracedAgent("goes", 0.1, "", 0, False, [TracedStep(100, 5), TracedStep(9, 5, "t", 60)])
    simulation, _ = simulate([stays, goes], worker_parameters(), live=False)
    closed = {agent.name: agent.closed_s for agent in agents_of(simulation)}
    assert closed["stays"] is None
    assert closed["goes"] is not None
    assert simulation.coordinator.store.get("stays") is not None


def test_a_context_that_never_fits_fails_its_agent_alone():
    big = TracedAgent("big", 0.0, "", 0, False, [TracedStep(5000, 5)])
    small = TracedAgent("small", 0.0, "", 0, False, [TracedStep(50, 5)])
    simulation, _ = simulate([big, small], worker_parameters())
    failures = {agent.name: agent.failure for agent in agents_of(simulation)}
    assert failures["big"] is not None
    assert failures["big"].reason == "CONTEXT_TOO_LONG"
    assert failures["small"] is None


def test_refused_agents_come_again_until_there_is_a_place():
    agents = population(6, 0, rate=1000.0)
    config = SchedulerConfig(max_sessions=2)
    simulation = Simulation(agents, config, worker_parameters(), Options(live=False))
    simulation.run()
    done = agents_of(simulation)
    assert all(agent.failure is None for agent in done)
    assert sum(agent.refusals for agent in done) > 0


def test_a_run_can_be_stopped_at_a_time():
    simulation, summary = simulate(population(10, 5), worker_parameters(), until_s=20.0)
    assert summary.interrupted
    assert summary.virtual_s == 20.0
    assert 10 <= len(requests_of(simulation)) < 60


def test_the_books_balance_through_a_whole_run():
    simulation = Simulation(
        population(60, 3), SchedulerConfig(), worker_parameters(150, 200), Options()
    )
    for until_s in range(1, 60, 3):
        simulation.events.at(float(until_s), simulation.workers[0].check_integrity)
    summary = simulation.run()
    simulation.workers[0].check_integrity()
    assert summary.stats_after["drops"] > 0
    assert summary.stats_after["device_total_blocks"] == 150
    device = [
        summary.stats_after[f"device_{use}_blocks"]
        for use in ("free", "used", "reclaimable", "in_flight")
    ]
    assert sum(device) == 150


def test_records_are_plain_data_without_defaults(tmp_path):
    write(tmp_path)
    lines = (tmp_path / "requests.jsonl").read_bytes().splitlines()
    kinds = {msgspec.json.decode(line)["event"] for line in lines}
    assert kinds == {"agent", "request", "signal", "stats", "tool"}
