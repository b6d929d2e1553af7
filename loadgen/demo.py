"""``python -m loadgen.demo``: ten agents that sleep and wake on a real model, in one command.

Starts ``djinn-server`` with a device pool that holds two or three of ten agents, runs
``configs/demo.yaml`` against it, and prints the report, the slowest wake as a trace and a talk.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import re
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from rich.console import Console

from loadgen import config, conversation, preparation, progress, report, runner, trace
from loadgen.errors import LoadgenError, ServerError
from loadgen.record import read_requests

READY_LINE = "Djinn runtime initialized"
CONNECT_LINE = re.compile(r"agents connect to (?P<endpoint>\S+:\d+)")
START_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 40.0
SERVER_NICENESS = 10
TRACE_FILE = "traces-server.jsonl"
LOG_FILE = "server.log"
_LAST_LINES = 15


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m loadgen.demo",
        description="Ten agents that sleep and wake on a real model: report, trace, conversation.",
    )
    parser.add_argument("--model", default="smollm2", help="what to serve (%(default)s)")
    parser.add_argument(
        "--config",
        type=Path,
        default=Path(__file__).parent / "configs" / "demo.yaml",
        help="the workload (%(default)s)",
    )
    parser.add_argument(
        "--device-pool-gib", type=float, default=0.011, help="KV on the device (%(default)s)"
    )
    parser.add_argument(
        "--host-swap-pool-gb", type=float, default=0.5, help="KV in host memory (%(default)s)"
    )
    parser.add_argument("--out", type=Path, help="the run's folder (runs/<time>-demo)")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    return parser.parse_args(argv)


def server_command(arguments: argparse.Namespace, folder: Path) -> list[str]:
    """Returns the command that starts the demo's server, on ports that the system chooses."""
    return [
        sys.executable,
        "-m",
        "services.server",
        f"--model={arguments.model}",
        "--enable-semantic-scheduler",
        "--idle-threshold-seconds=1.0",
        f"--device-pool-gib={arguments.device_pool_gib}",
        f"--host-swap-pool-gb={arguments.host_swap_pool_gb}",
        "--max-context-length=192",
        f"--trace-file={folder / TRACE_FILE}",
        "--log-level=WARNING",
        "--port=0",
        "--worker-port=0",
        "--metrics-port=0",
        "--worker-metrics-port=0",
    ]


@contextlib.asynccontextmanager
async def server(command: Sequence[str], log: Path) -> AsyncIterator[str]:
    """Runs a server while the context lasts; what it says goes to a log.

    Args:
        command: How to start it.
        log: Where its output goes.

    Yields:
        Its host:port.

    Raises:
        ServerError: It did not come up; the message has its last line.
    """
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        # Ctrl-C is for the demo, which then stops its server in order.
        start_new_session=True,
    )
    _stand_back(process.pid)
    watcher = _Watcher(process, log)
    reading = asyncio.create_task(watcher.read())
    try:
        yield await watcher.endpoint()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        await reading


def _stand_back(pid: int) -> None:
    """Has a server give way to the clients that take the times, where cores are few."""
    # It may have ended already, and a kernel need not know of groups.
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, SERVER_NICENESS)
        # Where time is shared between sessions first, niceness counts within one only.
        Path(f"/proc/{pid}/autogroup").write_text(str(SERVER_NICENESS), encoding="ascii")


class _Watcher:
    """Reads a server's output into a log, and finds out where it listens."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self._process = process
        self._log = log
        self._last: deque[str] = deque(maxlen=_LAST_LINES)
        self._address = ""
        self._ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def read(self) -> None:
        """Reads until the server's output ends."""
        assert self._process.stdout is not None
        with self._log.open("w", encoding="utf-8") as log:
            async for raw in self._process.stdout:
                line = raw.decode(errors="replace").rstrip()
                log.write(line + "\n")
                log.flush()
                self._last.append(line)
                if match := CONNECT_LINE.search(line):
                    self._address = match["endpoint"]
                if READY_LINE in line and not self._ready.done():
                    self._ready.set_result(self._address)
        if not self._ready.done():
            self._ready.set_result("")

    async def endpoint(self) -> str:
        """Returns host:port once the server is ready."""
        try:
            address = await asyncio.wait_for(asyncio.shield(self._ready), START_TIMEOUT_S)
        except TimeoutError:
            raise ServerError(
                f"the server was not ready within {START_TIMEOUT_S:g} s; see {self._log}"
            ) from None
        if not address:
            last = next((line for line in reversed(self._last) if line), "it said nothing")
            raise ServerError(f"the server did not start: {last} (see {self._log})")
        return address


async def demo(arguments: argparse.Namespace, console: Console) -> int:
    """Runs the demo and returns its exit code: 0 if the report is as expected."""
    workload = config.load(arguments.config)
    folder = preparation.run_folder(workload.experiment.name, arguments.out)
    console.print(
        f"Starting djinn-server with {arguments.model} (its weights are converted the first time)",
        highlight=False,
        soft_wrap=True,
    )
    display = progress.make(console, quiet=arguments.quiet)
    try:
        async with server(server_command(arguments, folder), folder / LOG_FILE) as endpoint:
            options = runner.RunOptions(
                server=endpoint, out=folder, trace=True, config_file=str(arguments.config)
            )
            await runner.run(workload, options, display)
    finally:
        display.close()
    return present(folder, console)


def present(folder: Path, console: Console) -> int:
    """Prints a demo's results and returns its exit code."""
    result = report.load(folder)
    report.save(folder, result)
    records = read_requests(folder)
    console.rule("Report", align="left")
    report.show(result, console)
    console.rule("The slowest wake", align="left")
    wakes = trace.slowest_wakes(trace.read(trace.files_of(folder)), 1)
    for spans in wakes:
        trace.waterfall(spans, console)
    agent = conversation.choose_agent(records)
    if agent is not None:
        console.rule(f"What agent {agent} said before and after it slept", align="left")
        conversation.show(records, agent, console)
        right, asked = conversation.count_remembered(records)
        console.print(
            f"\n{right} of {asked} answers have what the agent was told before it slept; they are "
            "the model's own, picked greedily and printed as they are.",
            highlight=False,
        )
    console.print(f"\n{folder}", style="dim", highlight=False)
    return 0 if result.passed else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo's command line and returns its exit code."""
    arguments = _arguments(argv)
    try:
        return asyncio.run(demo(arguments, progress.console()))
    except LoadgenError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
