"""Each test runs a program of a few lines as a process of its own, since it is about processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator

import pytest

from services.common.process import SUPERVISOR_VARIABLE

Start = Callable[..., "subprocess.Popen[str]"]

PRELUDE = """
import asyncio, os, signal, sys
from services.common.errors import ConfigError
from services.common import process
"""


@pytest.fixture
def start() -> Iterator[Start]:
    children = []

    def run(program: str, **environ: str) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [sys.executable, "-c", PRELUDE + textwrap.dedent(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environ},
        )
        children.append(child)
        return child

    yield run
    for child in children:
        child.kill()
        child.communicate()


def first_line(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


DRAINING = """
async def main(stop):
    print("started", flush=True)
    await stop.wait()
    print("draining", flush=True)
    {then}
    return 0
sys.exit(process.run("djinn-test", main))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_program_drain_and_end_well(start: Start, number: int) -> None:
    child = start(DRAINING.format(then="print('drained')"))
    assert first_line(child) == "started"

    child.send_signal(number)
    out, err = child.communicate()

    assert out == "draining\ndrained\n"
    assert (child.returncode, err) == (0, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupt_while_draining_ends_it_at_once_without_a_traceback(
    start: Start, number: int
) -> None:
    child = start(DRAINING.format(then="await asyncio.Event().wait()"))
    first_line(child)

    child.send_signal(number)
    assert first_line(child) == "draining"
    child.send_signal(signal.SIGINT)
    _, err = child.communicate()

    assert child.returncode == 130
    assert "Traceback" not in err


def test_a_repeated_sigterm_does_not_cut_the_drain_short(start: Start) -> None:
    child = start(DRAINING.format(then="sys.stdin.readline(); print('drained')"))
    first_line(child)

    child.send_signal(signal.SIGTERM)
    assert first_line(child) == "draining"
    child.send_signal(signal.SIGTERM)
    out, _ = child.communicate("\n")

    assert (child.returncode, out) == (0, "drained\n")


def test_a_config_error_is_one_line_and_code_2(start: Start) -> None:
    child = start("""
        async def main(stop):
            raise ConfigError("--port 5556: address\\nalready in use")
        sys.exit(process.run("djinn-test", main))
    """)
    out, err = child.communicate()

    assert (child.returncode, out) == (2, "")
    assert err == "djinn-test: --port 5556: address already in use\n"


def test_a_config_error_while_the_coroutine_is_made_is_one_line_too(start: Start) -> None:
    child = start("""
        def main(stop):
            raise ConfigError("--model x: no such folder")
        sys.exit(process.run("djinn-test", main))
    """)
    _, err = child.communicate()

    assert (child.returncode, err) == (2, "djinn-test: --model x: no such folder\n")


def test_a_bug_shows_its_stack_and_code_1(start: Start) -> None:
    child = start("""
        async def main(stop):
            raise ZeroDivisionError("oh")
        sys.exit(process.run("djinn-test", main))
    """)
    _, err = child.communicate()

    assert child.returncode == 1
    assert "djinn-test ends because of a bug" in err
    assert "ZeroDivisionError: oh" in err


def test_the_code_of_the_program_is_kept(start: Start) -> None:
    child = start("""
        async def main(stop):
            return 7
        sys.exit(process.run("djinn-test", main))
    """)
    child.communicate()

    assert child.returncode == 7


def test_a_supervised_program_drains_when_its_supervisor_is_killed(start: Start) -> None:
    supervisor = start(f"""
        import subprocess
        subprocess.Popen(
            [sys.executable, "-c", {PRELUDE + DRAINING.format(then="")!r}],
            env={{**os.environ, process.SUPERVISOR_VARIABLE: str(os.getpid())}},
        )
        signal.pause()
    """)
    assert first_line(supervisor) == "started"

    supervisor.kill()

    # The pipe ends when the last process that writes to it has ended.
    assert supervisor.stdout is not None
    assert supervisor.stdout.read() == "draining\n"


def test_a_program_whose_supervisor_is_gone_does_not_start(start: Start) -> None:
    child = start(DRAINING.format(then=""), **{SUPERVISOR_VARIABLE: "1"})
    out, err = child.communicate()

    assert (child.returncode, out) == (2, "")
    assert err == "djinn-test: the process 1 that started this one has ended\n"
