"""The supervisor with small programs for children, each told by its arguments what to do."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from services.common.process import adopt_orphans
from services.common.supervisor import Supervisor

CHILD = """
import os, subprocess, sys, time
from services.common import process
from services.common.errors import ConfigError

port, how, state = sys.argv[1:4]

async def main(stop):
    if how == "config":
        raise ConfigError("--model x: no such folder")
    if how == "early":
        return 3
    if how == "config-after-restart" and port != "None":
        raise ConfigError("--port: taken")
    helper = None
    if how == "helper":
        helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
        print("helper", helper.pid, flush=True)
    print(f"djinn-child ready on 127.0.0.1:{4242 if port == 'None' else port}", flush=True)
    await stop.wait()
    if how == "stubborn":
        await __import__("asyncio").Event().wait()
    print("drained", flush=True)
    return 0

sys.exit(process.run("djinn-child", main))
"""


class Rig:
    def __init__(self, how: str, stop_timeout_s: float) -> None:
        self.lines: list[str] = []
        self.said: list[str] = []
        self.changed = asyncio.Event()
        self.supervisor = Supervisor(
            "djinn-child",
            "supervised_child",
            lambda port: [str(port), how, "-"],
            stop_timeout_s=stop_timeout_s,
            echo=self._echo,
            say=self._say,
        )
        self.run = asyncio.create_task(self.supervisor.run())

    def _echo(self, line: str) -> None:
        self.lines.append(line)
        self.changed.set()

    def _say(self, line: str) -> None:
        self.said.append(line)
        self.changed.set()

    @property
    def pids(self) -> list[int]:
        return [int(line.rsplit(" ", 1)[1]) for line in self.said if "is process" in line]

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self.changed.clear()
            await self.changed.wait()

    async def stop(self) -> None:
        self.run.cancel()
        await asyncio.gather(self.run, return_exceptions=True)
        await self.supervisor.stop()


@pytest.fixture
async def start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Callable[..., Rig]]:
    (tmp_path / "supervised_child.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    adopt_orphans()
    rigs = []

    def make(how: str, stop_timeout_s: float = 30) -> Rig:
        rigs.append(Rig(how, stop_timeout_s))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.supervisor.kill()
        await rig.stop()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_it_is_ready_when_the_child_says_so(start: Callable[..., Rig]) -> None:
    rig = start("serve")

    await rig.supervisor.ready.wait()

    assert rig.supervisor.port == 4242
    assert rig.lines == ["djinn-child ready on 127.0.0.1:4242"]


async def test_stop_lets_the_child_drain(start: Callable[..., Rig]) -> None:
    rig = start("serve")
    await rig.supervisor.ready.wait()

    await rig.stop()

    assert rig.lines[-1] == "drained"
    assert not alive(rig.pids[0])


async def test_a_child_that_does_not_drain_is_killed(start: Callable[..., Rig]) -> None:
    rig = start("stubborn", stop_timeout_s=0.05)
    await rig.supervisor.ready.wait()

    await rig.stop()

    assert not alive(rig.pids[0])


async def test_a_killed_child_is_started_again_on_its_port(start: Callable[..., Rig]) -> None:
    rig = start("serve")
    await rig.supervisor.ready.wait()

    os.kill(rig.pids[0], signal.SIGKILL)
    await rig.until(lambda: rig.lines.count("djinn-child ready on 127.0.0.1:4242") == 2)

    await rig.supervisor.ready.wait()
    assert rig.supervisor.restarts == 1
    assert any("has died (SIGKILL); starting it again" in line for line in rig.said)


async def test_it_is_not_ready_while_the_child_is_gone(start: Callable[..., Rig]) -> None:
    rig = start("serve")
    await rig.supervisor.ready.wait()

    os.kill(rig.pids[0], signal.SIGKILL)
    await rig.until(lambda: any("has died" in line for line in rig.said))

    assert not rig.supervisor.ready.is_set()


async def test_what_a_killed_child_leaves_behind_has_gone_before_it_starts_again(
    start: Callable[..., Rig],
) -> None:
    rig = start("helper")
    await rig.supervisor.ready.wait()
    helper = int(rig.lines[0].split()[1])
    assert alive(helper)

    os.kill(rig.pids[0], signal.SIGKILL)
    await rig.until(lambda: any("has died" in line for line in rig.said))

    assert not alive(helper)


async def test_a_child_refused_its_configuration_is_not_started_again(
    start: Callable[..., Rig],
) -> None:
    rig = start("config")

    assert await rig.run == 2
    assert len(rig.pids) == 1


async def test_a_child_refused_after_a_restart_is_given_up_too(start: Callable[..., Rig]) -> None:
    rig = start("config-after-restart")
    await rig.supervisor.ready.wait()

    os.kill(rig.pids[0], signal.SIGKILL)

    assert await rig.run == 2
    assert len(rig.pids) == 2


async def test_a_child_that_ends_before_it_is_ready_is_given_up(start: Callable[..., Rig]) -> None:
    rig = start("early")

    assert await rig.run == 3
    assert rig.said[-1] == "djinn-child ended before it was ready (exit code 3)"
