"""``djinn-server`` as processes of its own, and a wake through all of them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from opentelemetry.sdk.trace import TracerProvider

import djinn_client as djinn

READY_LINE = "Djinn runtime initialized"
NO_PORTS = ("--port=0", "--worker-port=0", "--metrics-port=0", "--worker-metrics-port=0")
SMALL = ("--model=dummy:tiny", "--device=cpu", "--device-pool-gib=0.02", "--cpu-threads=1")
PROMPT = list(range(1, 50))
TRACED = (*NO_PORTS, *SMALL, "--enable-semantic-scheduler", "--host-swap-pool-gb=0.02")
"""Flags of a server that `wake_up` may be run against."""
SPANS_OF_A_WAKE = {
    ("agent", "agent.wake"),
    ("djinn-scheduler", "signal_phase"),
    ("djinn-scheduler", "policy.decide"),
    ("djinn-worker", "kv.restore"),
    ("djinn-worker", "generate"),
    ("djinn-worker", "queue"),
    ("djinn-worker", "prefill"),
}
"""The (service, span) pairs that one wake leaves under one trace id."""


class Server:
    """A djinn-server, its lines and its children's process ids."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self._stderr = folder / "stderr"
        with self._stderr.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "services.server", *flags],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        self.lines: list[str] = []

    def read_until(self, pattern: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            if re.search(pattern, line):
                return line
        raise AssertionError(f"no line {pattern!r}: {self.lines} {self.stderr}")

    @property
    def stderr(self) -> str:
        return self._stderr.read_text()

    @property
    def endpoint(self) -> str:
        [line] = [line for line in self.lines if line.startswith("agents connect to ")]
        return line.split()[3]

    def pid(self, name: str) -> int:
        return int(re.findall(rf"{name} is process (\d+)", self.stderr)[-1])

    def rest(self) -> list[str]:
        assert self.process.stdout is not None
        rest = self.process.stdout.read().splitlines()
        self.process.wait()
        return rest

    def interrupt(self) -> None:
        """Ends it as Ctrl-C does; then all that it had to say has been said."""
        self.process.send_signal(signal.SIGINT)
        self.rest()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


async def wake_up(server: Server, provider: TracerProvider) -> None:
    """Lets one agent wake whose KV has left the device, then ends the server and `provider`."""
    async with (
        await djinn.connect(server.endpoint, tracer_provider=provider) as client,
        client.session() as agent,
    ):
        await agent.generate(PROMPT, max_tokens=4, ignore_eos=True).result()
        async with agent.tool("search"):
            outcome = await client.admin.evict(agent.session_id, djinn.EvictMode.RELEASE)
            assert not outcome.kv.resident
            assert outcome.kv.host_blocks == outcome.kv.total_blocks
        await agent.generate([7, 8, 9], max_tokens=4, ignore_eos=True).result()
    provider.shutdown()
    server.interrupt()
