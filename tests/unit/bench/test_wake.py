"""How wakes become tables, and which server a benchmark starts."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench import _floors, _server, interference, wake
from bench._decoders import Measured
from bench._disturbers import Done
from bench._floors import Speeds
from bench._server import Pools
from bench._wakes import Life, Wake
from bench.interference import Rounds

MODEL = _floors.model_shape("dummy:tiny", "cpu")
SPEEDS = Speeds(1e9, 1e12, 5e8, 4e8)


def test_each_way_to_find_the_kv_has_its_row() -> None:
    wakes = [
        Wake(10.0, 400, 0, 0),
        Wake(30.0, 200, 3, 0),
        Wake(4.0, 0, 5, 0),
        Wake(90.0, 400, 0, 7),
    ]
    rows = wake.latency_rows(wakes, resident_floor_ms=2.0, moved_floor_ms=5.0)
    assert [(row["name"], row["wakes"], row["p50_ms"], row["ratio"]) for row in rows] == [
        ("KV copied back", 2, 10.0, 2.0),
        ("KV on the device", 1, 4.0, 2.0),
        ("KV computed again", 1, 90.0, 18.0),
    ]
    assert (rows[0]["copied_bytes"], rows[0]["found_blocks"], rows[0]["max_ms"]) == (300, 1.5, 30.0)


def test_the_floor_is_a_copy_and_a_step() -> None:
    life = Life(context=100, append=32, generate=8)
    step_ms = _floors.step_floor_s(MODEL, [(100, 32)], SPEEDS) * 1e3
    copy_ms = 100 * MODEL.token_bytes / 5e8 * 1e3
    assert wake.floors_ms(MODEL, SPEEDS, life, None) == (step_ms, step_ms + copy_ms)
    assert wake.floors_ms(MODEL, SPEEDS, life, 5.0) == (5.0, 5.0 + copy_ms)


def server_arguments(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    _server.add_server_flags(parser)
    return parser.parse_args(flags)


def test_a_server_has_the_pools_that_the_benchmark_needs() -> None:
    line = _server.command(server_arguments(), Pools(1 << 29, 1 << 30), Path("spans"))
    assert {"--device-pool-gib=0.500000", "--host-pool-gib=1.000000", "--trace-file=spans"} <= set(
        line
    )


def test_flags_override_what_the_benchmark_needs() -> None:
    args = server_arguments("--host-pool-gib=3", "--server-flag=--cpu-threads=1")
    line = _server.command(args, Pools(None, 1 << 30), None)
    assert "--host-pool-gib=3.000000" in line
    assert line[-1] == "--cpu-threads=1"
    assert not any(flag.startswith(("--device-pool", "--trace-file")) for flag in line)


def test_no_block_is_lost_on_the_way_to_the_server() -> None:
    size = _server.sessions_bytes(MODEL, "cpu", 3, 17)
    assert size == 3 * 2 * 16 * MODEL.token_bytes
    [flag] = [
        flag
        for flag in _server.command(server_arguments(), Pools(size, 0), None)
        if flag.startswith("--device-pool-gib=")
    ]
    assert int(float(flag.partition("=")[2]) * 2**30) >= size


def test_agents_are_spread_over_processes() -> None:
    args = argparse.Namespace(processes=3, agents=7, context=10)
    jobs = interference.jobs(args, "here:1", 50)
    assert [job.agents for job in jobs] == [3, 2, 2]
    assert len({job.seed for job in jobs}) == 3


def test_others_are_compared_with_agents_alone() -> None:
    alone = Rounds([Measured([2.0, 4.0], 0.1)], [Done()])
    done = Done(seconds=2.0, loaded_bytes=10, stored_bytes=4, refused=1, first_token_ms=[7.0])
    beside = Rounds([Measured([3.0], 0.2), Measured([6.0], 0.3)], [done])
    rows = interference.rows_of({interference.ALONE: alone, interference.MOVING: beside})
    assert (rows[0]["p99_ms"], rows[0]["ratio"], rows[0]["new_agents"]) == (4.0, 1.0, 0)
    assert (rows[1]["p50_ratio"], rows[1]["ratio"]) == (1.5, 1.5)
    assert (rows[1]["loaded_bytes_per_s"], rows[1]["stored_bytes_per_s"]) == (5.0, 2.0)
    assert (rows[1]["first_token_p50_ms"], rows[1]["loop_lag_p99_ms"]) == (7.0, 0.3)
    assert rows[1]["refused_evictions"] == 1
