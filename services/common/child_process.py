"""A child process with all it starts: its lines, the moment it is ready, and its certain end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence

from services.common.process import SUPERVISOR_VARIABLE

_READY = re.compile(r"ready on (?P<host>\S+):(?P<port>\d+)")
_MAX_LINE_BYTES = 2**20
_LAST_LINES_S = 1.0


class ChildProcess:
    """A Python module run as a child, in a process group of its own.

    The group keeps a terminal's Ctrl-C from it, so that it ends when its parent says; and with the
    group goes all it started. It ends with its parent, however that ends.

    Attributes:
        name: The program's name, for messages.
        pid: Its process id, which is its group's too.
        port: The port in its line ``… ready on HOST:PORT``; None until `wait_ready` has returned.
    """

    def __init__(
        self, name: str, process: subprocess.Popen[bytes], echo: Callable[[str], None]
    ) -> None:
        """Wraps a process whose stdout is a pipe; `start` makes one.

        Args:
            name: The program's name.
            process: The process, leader of its group.
            echo: Given each line of its stdout.
        """
        self.name = name
        self.pid = process.pid
        self.port: int | None = None
        self._process = process
        self._echo = echo
        self._ready: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._ended = asyncio.create_task(self._follow(), name=f"{name}-{process.pid}")

    @classmethod
    def start(
        cls, name: str, module: str, arguments: Sequence[str], echo: Callable[[str], None]
    ) -> ChildProcess:
        """Starts ``python -m module arguments``; to be called in a running loop.

        Args:
            name: The program's name, for messages.
            module: What to run.
            arguments: Its arguments.
            echo: Given each line of its stdout.
        """
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, SUPERVISOR_VARIABLE: str(os.getpid()), "PYTHONUNBUFFERED": "1"},
        )
        return cls(name, process, echo)

    async def wait_ready(self) -> bool:
        """Waits until it is ready.

        Returns:
            True if it is ready, False if it has ended before.
        """
        await asyncio.wait({self._ready, self._ended}, return_when=asyncio.FIRST_COMPLETED)
        if not self._ready.done():
            return False
        self.port = self._ready.result()
        return True

    async def wait(self) -> int:
        """Waits until it and all it started have ended.

        Returns:
            Its exit code; negative: the signal that ended it.
        """
        return await asyncio.shield(self._ended)

    async def stop(self, timeout_s: float) -> int:
        """Tells it to stop, and kills it if it takes too long.

        Args:
            timeout_s: How long it may take to drain, in seconds.

        Returns:
            As `wait`.
        """
        if not self._ended.done():
            self._process.send_signal(signal.SIGTERM)
        try:
            return await asyncio.wait_for(asyncio.shield(self._ended), timeout_s)
        except TimeoutError:
            self.kill()
            return await self.wait()

    def kill(self) -> None:
        """Ends it and all it started at once."""
        if self._ended.done():
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    async def _follow(self) -> int:
        lines = asyncio.create_task(self._read_lines())
        try:
            # Not asyncio's subprocess: it waits for the pipe's end too, which what the child
            # started may hold open.
            code = await asyncio.to_thread(self._process.wait)
            await self._end_group()
            # All writers are gone, unless one has left the group.
            await asyncio.wait({lines}, timeout=_LAST_LINES_S)
        finally:
            lines.cancel()
        return code

    async def _read_lines(self) -> None:
        reader = asyncio.StreamReader(limit=_MAX_LINE_BYTES)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), self._process.stdout
        )
        try:
            while raw := await reader.readline():
                line = raw.decode("utf-8", "replace").rstrip("\n")
                self._echo(line)
                found = _READY.search(line)
                if found is not None and not self._ready.done():
                    self._ready.set_result(int(found["port"]))
        finally:
            transport.close()

    async def _end_group(self) -> None:
        """Kills what the process left behind, and waits until it has gone.

        The kernel frees a process's memory, and its GPU's, only as it ends; who starts the same
        program again must not find them taken.
        """
        self.kill()
        await asyncio.to_thread(_wait_for_group, self.pid)


def _wait_for_group(group: int) -> None:
    # Without `adopt_orphans` another process waits for them, and there is nothing to wait for here.
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-group, 0)
