"""``djinn-server`` as a user runs it: real processes, a small model of random weights."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import djinn_client as djinn
from djinn_client.tracing import tracer_provider
from loadgen.stages import STAGES, stages_of
from loadgen.trace import read, slowest_wakes
from tests.support.djinn_server import (
    NO_PORTS,
    PROMPT,
    READY_LINE,
    SMALL,
    SPANS_OF_A_WAKE,
    TRACED,
    Server,
    wake_up,
)

pytestmark = pytest.mark.timeout(240)

# The seed's check of its server's health, with the port of this one.
SEEDS_CHECK = """
import json, sys
d = json.load(sys.stdin)
ss = d.get('semantic_scheduler', {})
sw = ss.get('swap_pool', {})
print(f'Server OK: swaps={sw.get("swaps_performed", 0)}, status={d.get("status", "unknown")}')
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def metrics_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, metrics_port: int) -> Iterator[Server]:
    """A server that runs through the module; each test leaves it running."""
    with Server(
        tmp_path_factory.mktemp("server"),
        "--port=0",
        "--worker-port=0",
        f"--metrics-port={metrics_port}",
        "--worker-metrics-port=0",
        "--enable-semantic-scheduler",
        "--host-swap-pool-gb=0.02",
        *SMALL,
    ) as server:
        server.read_until(READY_LINE)
        yield server


async def generate(client: djinn.Client, tokens: int) -> tuple[int, ...]:
    async with client.session() as agent:
        result = await agent.generate(PROMPT, max_tokens=tokens, ignore_eos=True).result()
    return tuple(result.token_ids)


async def test_agents_can_connect_where_it_says(server: Server) -> None:
    async with await djinn.connect(server.endpoint) as client:
        assert len(await generate(client, 8)) == 8


async def test_the_seeds_health_check_counts_swaps(server: Server, metrics_port: int) -> None:
    async with await djinn.connect(server.endpoint) as client, client.session() as agent:
        await agent.generate(PROMPT, max_tokens=4, ignore_eos=True).result()
        async with agent.tool("search"):
            pass

    vmu = await asyncio.to_thread(fetch, f"http://127.0.0.1:{metrics_port}/metrics/vmu")
    checked = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", SEEDS_CHECK],
        input=vmu,
        capture_output=True,
        check=True,
    )

    assert re.fullmatch(rb"Server OK: swaps=\d+, status=ok\n", checked.stdout)
    assert json.loads(vmu)["semantic_scheduler"]["policy"] == "semantic"


def fetch(url: str) -> bytes:
    with urllib.request.urlopen(url) as response:
        body: bytes = response.read()
        return body


async def test_one_wake_is_one_trace_through_all_three_processes(tmp_path: Path) -> None:
    trace_file = tmp_path / "trace.jsonl"
    provider = tracer_provider("agent", trace_file=trace_file, environ={})
    assert provider is not None
    with Server(tmp_path, *TRACED, f"--trace-file={trace_file}") as server:
        server.read_until(READY_LINE)
        await wake_up(server, provider)

    found = list(spans(trace_file))
    [wake] = [trace_id for trace_id, _, name, _ in found if name == "agent.wake"]
    names = {(service, name) for trace_id, service, name, _ in found if trace_id == wake}
    assert names >= SPANS_OF_A_WAKE
    moved = [
        int(attributes["djinn.kv.bytes"]["intValue"])
        for trace_id, _, name, attributes in found
        if trace_id == wake and name == "kv.restore"
    ]
    assert any(moved)


async def test_the_stages_of_a_wake_add_up_to_it(tmp_path: Path) -> None:
    trace_file = tmp_path / "trace.jsonl"
    provider = tracer_provider("agent", trace_file=trace_file, environ={})
    assert provider is not None
    with Server(tmp_path, *TRACED, f"--trace-file={trace_file}") as server:
        server.read_until(READY_LINE)
        await wake_up(server, provider)

    [wake] = slowest_wakes(read([trace_file]), 5)
    stages = stages_of(wake)
    assert stages is not None
    parts = {name: getattr(stages, f"{name}_ms") for name in (*STAGES, "unaccounted")}
    assert all(part >= 0 for part in parts.values()), parts
    assert sum(parts.values()) == pytest.approx(stages.total_ms)
    # Every process has said what it did: no time is missing, and none is another's.
    assert stages.unaccounted_ms == pytest.approx(0, abs=1e-6)
    # Signal and Generate race each other; what the winner starts takes time in any case.
    assert min(parts["load"], parts["step"], parts["return"]) > 0, parts


def spans(path: Path) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Yields trace id, service, name and attributes of each span in a file."""
    for line in path.read_text().splitlines():
        for resource in json.loads(line)["resourceSpans"]:
            service = values(resource["resource"])["service.name"]["stringValue"]
            for scope in resource["scopeSpans"]:
                for span in scope["spans"]:
                    yield span["traceId"], service, span["name"], values(span)


def values(owner: dict[str, Any]) -> dict[str, Any]:
    """Returns the attributes of a span or a resource by name."""
    return {item["key"]: item["value"] for item in owner.get("attributes", ())}


@pytest.mark.parametrize("victim", ["djinn-scheduler", "djinn-worker"])
async def test_agents_finish_with_the_same_tokens_though_a_part_is_killed(
    server: Server, victim: str
) -> None:
    agents, tokens = 4, 200
    async with await djinn.connect(server.endpoint) as client:
        expected = await generate(client, tokens)
        begun = [asyncio.Event() for _ in range(agents)]

        async def run(index: int) -> list[int]:
            got: list[int] = []
            async with client.session() as agent:
                async for piece in agent.generate(PROMPT, max_tokens=tokens // 2, ignore_eos=True):
                    got += piece.token_ids
                    begun[index].set()
                async with agent.tool("search"):
                    pass
                async for piece in agent.generate([], max_tokens=tokens // 2, ignore_eos=True):
                    got += piece.token_ids
            return got

        running = [asyncio.create_task(run(index)) for index in range(agents)]
        for event in begun:
            await event.wait()
        os.kill(server.pid(victim), signal.SIGKILL)

        assert [tuple(got) for got in await asyncio.gather(*running)] == [expected] * agents
    assert f"{victim} (process" in server.stderr


async def test_ctrl_c_ends_all_of_it_in_order(server: Server) -> None:
    children = [server.pid("djinn-scheduler"), server.pid("djinn-worker")]

    server.interrupt()

    assert server.process.returncode == 0
    # The worker first: the scheduler answers agents until their last token is out.
    said = server.stderr
    assert said.rindex("front.app: draining") < said.rindex("scheduler.app: draining")
    assert "Traceback" not in server.stderr
    for pid in children:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_children_end_with_a_server_that_is_killed(tmp_path: Path) -> None:
    with Server(tmp_path, *NO_PORTS, *SMALL, "--host-swap-pool-gb=0.02") as server:
        server.read_until(READY_LINE)

        server.process.kill()

        # The pipe that the children's lines come through ends with the server; theirs to stderr
        # is a file. So wait for the processes themselves.
        for name in ("djinn-worker", "djinn-scheduler"):
            wait_for_end(server.pid(name))


def wait_for_end(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        handle = os.pidfd_open(pid)
        try:
            select.select([handle], [], [])
        finally:
            os.close(handle)


def run(tmp_path: Path, flags: Sequence[str]) -> tuple[int, str, list[str]]:
    """Returns exit code, last line and stdout of a server that cannot start."""
    with Server(tmp_path, *flags) as server:
        out = server.rest()
        return server.process.returncode, server.stderr.splitlines()[-1], out


def test_a_busy_port_is_one_line_and_code_2(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, line, _ = run(tmp_path, [*NO_PORTS, *SMALL, f"--port={port}"])

    assert (code, line) == (2, f"djinn-server: --port {port}: address already in use")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model=/no/such/folder"], "/no/such/folder"),
        (["--device-pool-gib=0.0000001"], "device"),
        (["--policy=fortune-teller"], "fortune-teller"),
    ],
)
def test_what_a_part_refuses_ends_the_server_with_its_line(
    tmp_path: Path, flags: list[str], said: str
) -> None:
    code, line, out = run(tmp_path, [*NO_PORTS, *SMALL, *flags])

    assert code == 2
    assert line.startswith("djinn-")
    assert said in line
    assert READY_LINE not in out
