"""The smoke test on a real ``djinn-server`` whose scheduler and worker are killed in the middle."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

import loadgen
from loadgen import config, report, runner
from loadgen.progress import NoProgress
from loadgen.record import REQUESTS_FILE, RequestRecord, read_requests, read_run
from loadgen.runner import RunOptions

pytestmark = pytest.mark.timeout(240)

SMOKE_TEST = Path(loadgen.__file__).parent / "configs" / "poisson_smoke_test.yaml"
AGENTS = 10
FEWER = {
    "workload.arrival_rate": "0.8",
    "workload.think_time_min": "3",
    "workload.think_time_max": "5",
    "workload.context_length": "200",
    "workload.new_tokens": "30",
}
READY_LINE = "Djinn runtime initialized"


class Server:
    """A djinn-server and what it says of its children."""

    def __init__(self, folder: Path) -> None:
        self._log = folder / "server.log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "services.server"),
                    *("--port=0", "--worker-port=0", "--metrics-port=0"),
                    *("--worker-metrics-port=0", "--enable-semantic-scheduler"),
                    *("--model=dummy:tiny", "--device=cpu", "--cpu-threads=1"),
                    *("--device-pool-gib=0.02", "--host-swap-pool-gb=0.05"),
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def endpoint(self) -> str:
        return re.findall(r"agents connect to (\S+:\d+)", self.log)[0]

    def pids(self, name: str) -> list[int]:
        """Returns the process ids that a child has had, in order."""
        return [int(pid) for pid in re.findall(rf"{name} is process (\d+)", self.log)]

    async def until(self, reached: Callable[[], bool]) -> None:
        while not reached():
            assert self.process.poll() is None, self.log
            await asyncio.sleep(0.05)

    async def kill(self, name: str) -> None:
        """Kills a child as a crash would, and returns once another has taken its place."""
        before = self.pids(name)
        os.kill(before[-1], signal.SIGKILL)
        await self.until(lambda: len(self.pids(name)) > len(before))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    started = Server(tmp_path)
    try:
        yield started
        started.process.send_signal(signal.SIGTERM)
        started.process.wait(60)
    finally:
        started.process.kill()
        started.process.wait()


async def run(server: Server, folder: Path) -> Path:
    options = RunOptions(server=server.endpoint, out=folder, record_tokens=True, processes=1)
    return await runner.run(config.load(SMOKE_TEST, FEWER), options, NoProgress())


def requests_in(folder: Path) -> list[RequestRecord]:
    return [record for record in read_requests(folder) if isinstance(record, RequestRecord)]


def tokens(folder: Path) -> dict[tuple[int, int], list[int]]:
    return {(record.agent, record.step): record.token_ids for record in requests_in(folder)}


def has_written(folder: Path, count: int) -> bool:
    """Returns whether so many requests have ended, while more are being written."""
    file = folder / REQUESTS_FILE
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    return sum(json.loads(line)["event"] == "request" for line in lines) >= count


async def test_every_agent_finishes_with_the_same_tokens(server: Server, tmp_path: Path) -> None:
    await server.until(lambda: READY_LINE in server.log)
    calm = await run(server, tmp_path / "calm")

    running = asyncio.create_task(run(server, tmp_path / "killed"))
    for name, ended in (("scheduler", 4), ("worker", 8)):
        await server.until(partial(has_written, tmp_path / "killed", ended))
        await server.kill(name)
        assert not running.done()
    killed = await running

    expected = tokens(calm)
    assert len(expected) == 2 * AGENTS
    assert all(len(ids) == 30 for ids in expected.values())
    assert tokens(killed) == expected
    result = report.load(killed)
    assert result.errors == []
    assert result.aggregates["success_count"] == AGENTS


async def test_each_run_counts_what_it_did_itself(server: Server, tmp_path: Path) -> None:
    await server.until(lambda: READY_LINE in server.log)
    quick = FEWER | {
        "workload.arrival_rate": "20",
        "workload.think_time_min": "0.1",
        "workload.think_time_max": "0.2",
        "workload.total_agents": "3",
    }
    tenants = set()
    for number in range(3):
        options = RunOptions(server=server.endpoint, out=tmp_path / str(number), processes=1)
        folder = await runner.run(config.load(SMOKE_TEST, quick), options, NoProgress())
        info = read_run(folder)
        assert info.stats_settled
        tenants.add(info.tenant)
        ended = requests_in(folder)
        aggregates = report.load(folder).aggregates
        # Each first prompt is computed anew: nothing of an earlier run is found in its tenant.
        assert aggregates["prefilled_tokens"] == sum(one.prefilled_tokens for one in ended)
        assert sum(one.prefilled_tokens for one in ended if one.step == 0) == 3 * 200
        assert aggregates["prefix_hit_tokens"] == 0
        assert aggregates["evictions"] == 3
    assert len(tenants) == 3
