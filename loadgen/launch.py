"""Starts a system for as long as it is needed, and waits until it can serve."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

from loadgen import systems
from loadgen.errors import LoadgenError, ServerError
from loadgen.systems import System
from loadgen.targets import registry
from loadgen.targets.base import TargetError

STOP_TIMEOUT_S = 40.0
_ASK_INTERVAL_S = 0.5


@contextlib.asynccontextmanager
async def running(
    name: str, system: System, log: Path, say: Callable[[str], None]
) -> AsyncIterator[str]:
    """Has a system serve while the context lasts.

    Args:
        name: What it is called.
        system: What it is. With a command it is started, and stopped in the end.
        log: Where its output goes.
        say: Takes a line about each step.

    Yields:
        Its host:port or URL.

    Raises:
        LoadgenError: It did not come up, or is not there; the message says why in one line.
    """
    if not system.command:
        try:
            await _ask(system, system.server)
        except (ServerError, TargetError) as error:
            raise ServerError(f"system {name}: {error}") from None
        yield system.server
        return
    port = free_port()
    server = systems.server_of(system, port)
    words = _with_program(name, systems.command_of(system, port))
    say(f"starting {name}, its output is in {log}")
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *words,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, **system.env},
            # Ctrl-C is for the load generator, which then stops the system in order.
            start_new_session=True,
        )
    try:
        await _until_ready(name, system, server, process, log)
        yield server
    finally:
        await _stop(process)


def free_port() -> int:
    """Returns a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port: int = probe.getsockname()[1]
        return port


def find_program(name: str) -> str | None:
    """Returns a program's path: beside this Python, or on the path; None: there is none."""
    beside = Path(sys.executable).parent / name
    return str(beside) if os.access(beside, os.X_OK) else shutil.which(name)


def _with_program(name: str, words: Sequence[str]) -> list[str]:
    """Returns a system's command with its program's path."""
    found = find_program(words[0])
    if found is None:
        raise LoadgenError(f"system {name}: {words[0]}: no such program")
    return [found, *words[1:]]


async def _until_ready(
    name: str, system: System, server: str, process: asyncio.subprocess.Process, log: Path
) -> None:
    """Asks until the system can serve."""
    ended = asyncio.create_task(process.wait())
    problem = "it does not answer"
    try:
        async with asyncio.timeout(system.ready_timeout_s):
            while not ended.done():
                try:
                    return await _ask(system, server)
                except (ServerError, TargetError) as error:
                    problem = str(error)
                await asyncio.wait({ended}, timeout=_ASK_INTERVAL_S)
    except TimeoutError:
        raise ServerError(
            f"system {name}: not ready within {system.ready_timeout_s:g} s: {problem} (see {log})"
        ) from None
    finally:
        ended.cancel()
    raise ServerError(
        f"system {name}: ended with exit code {process.returncode} before it could serve: "
        f"{_last_line(log)} (see {log})"
    )


async def _ask(system: System, server: str) -> None:
    """Returns if a system can serve."""
    target = await registry.connect(system.target, server, openai=system.openai)
    try:
        await target.info()
    finally:
        await target.aclose()


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")


async def _stop(process: asyncio.subprocess.Process) -> None:
    """Has a process end in order, and ends it and all that it started if it does not."""
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()
