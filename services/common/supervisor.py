"""Keeps one child process running: starts it again when it dies, gives up when it cannot start."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Sequence

from services.common.child_process import ChildProcess
from services.common.process import EXIT_CONFIG, EXIT_FAILURE

_FIRST_DELAY_S = 0.1
_LONGEST_DELAY_S = 5.0
# A child that has served this long did not die of how it was started.
_SETTLED_S = 10.0


class Supervisor:
    """Runs one program and runs it again when it dies.

    Attributes:
        name: The program's name, for messages.
        ready: Set while the program is ready.
        port: The port it listens on, once it was ready; it keeps it when started again.
        restarts: How often it was started again.
    """

    def __init__(
        self,
        name: str,
        module: str,
        arguments: Callable[[int | None], Sequence[str]],
        *,
        stop_timeout_s: float,
        echo: Callable[[str], None],
        say: Callable[[str], None],
    ) -> None:
        """Makes one; `run` starts the program.

        Args:
            name: The program's name.
            module: The module that is it.
            arguments: Its arguments, given the port that it must listen on, None for the first
                start.
            stop_timeout_s: How long it may take to drain.
            echo: Given each line of its stdout.
            say: Given each line for the user.
        """
        self.name = name
        self.ready = asyncio.Event()
        self.port: int | None = None
        self.restarts = 0
        self._module = module
        self._arguments = arguments
        self._stop_timeout_s = stop_timeout_s
        self._echo = echo
        self._say = say
        self._child: ChildProcess | None = None

    async def run(self) -> int:
        """Runs the program until there is no use in it.

        Returns:
            The exit code to end with, never 0: the program was refused its configuration, or ended
            before it ever was ready.
        """
        loop = asyncio.get_running_loop()
        delay_s = _FIRST_DELAY_S
        while True:
            child = ChildProcess.start(
                self.name, self._module, self._arguments(self.port), self._echo
            )
            self._child = child
            self._say(f"{self.name} is process {child.pid}")
            started_s = loop.time()
            if await child.wait_ready():
                self.port = child.port
                self.ready.set()
            code = await child.wait()
            self.ready.clear()
            if code == EXIT_CONFIG:
                return EXIT_CONFIG
            if self.port is None:
                self._say(f"{self.name} ended before it was ready ({_cause(code)})")
                return code if code > 0 else EXIT_FAILURE
            if loop.time() - started_s > _SETTLED_S:
                delay_s = _FIRST_DELAY_S
            self._say(
                f"{self.name} (process {child.pid}) has died ({_cause(code)}); "
                f"starting it again in {delay_s:g} s"
            )
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, _LONGEST_DELAY_S)
            self.restarts += 1

    async def stop(self) -> None:
        """Ends the program; call it when `run` has been cancelled."""
        if self._child is not None:
            await self._child.stop(self._stop_timeout_s)

    def kill(self) -> None:
        """Ends the program and all it started at once."""
        if self._child is not None:
            self._child.kill()


def _cause(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    return signal.Signals(-code).name
