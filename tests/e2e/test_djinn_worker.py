"""The `djinn-worker` command with a real engine: how its two processes live and die."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from djinn.v1 import inference_service_pb2 as pb
from djinn.v1 import inference_service_pb2_grpc as pb_grpc
from services.common.session_token import SessionToken

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

COMMAND = (
    *(sys.executable, "-m", "services.worker", "--model", "dummy:tiny"),
    *("--port", "0", "--metrics-port", "0", "--device-pool-gib", "0.02"),
    *("--host-pool-gib", "0.05", "--cpu-threads", "1"),
)


@dataclass
class Worker:
    """A worker that serves."""

    process: asyncio.subprocess.Process
    engine_pid: int
    stub: Any

    def generate(self, session: str = "s", **fields: Any) -> Any:
        return self.stub.Generate(
            pb.GenerateRequest(
                session_id=session,
                session_token=SessionToken(session).encode(),
                append_token_ids=pb.TokenIds(ids=[1, 2, 3]),
                ignore_eos=True,
                **fields,
            )
        )

    async def end(self) -> tuple[int, str]:
        """Waits for its end; returns its exit code and what it wrote to stderr."""
        _, errors = await self.process.communicate()
        assert self.process.returncode is not None
        return self.process.returncode, errors.decode()


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def left_in(folder: Path) -> list[Path]:
    return list(folder.glob("djinn-*"))


def is_running(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def is_engine(pid: int) -> bool:
    return b"--multiprocessing-fork" in Path(f"/proc/{pid}/cmdline").read_bytes()


@pytest.fixture
async def worker(tmp_path: Path) -> AsyncIterator[Worker]:
    process = await asyncio.create_subprocess_exec(
        *COMMAND,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    try:
        assert process.stdout is not None
        line = (await process.stdout.readline()).decode()
        assert line.startswith("djinn-worker ready on ")
        engine = next(pid for pid in children_of(process.pid) if is_engine(pid))
        async with grpc.aio.insecure_channel(line.split()[-1]) as channel:
            yield Worker(process, engine, pb_grpc.InferenceServiceStub(channel))
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


async def test_sigterm_lets_a_running_generation_end(worker: Worker) -> None:
    responses = aiter(worker.generate(max_tokens=300))
    await anext(responses)
    worker.process.send_signal(signal.SIGTERM)
    *_, last = [response async for response in responses]
    assert last.finished.usage.completion_tokens == 300
    code, _ = await worker.end()
    assert code == 0
    assert not is_running(worker.engine_pid)


async def test_a_killed_engine_ends_the_worker_with_a_line(worker: Worker) -> None:
    responses = aiter(worker.generate(max_tokens=1000))
    await anext(responses)
    os.kill(worker.engine_pid, signal.SIGKILL)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in responses:
            pass
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "signal 9" in (caught.value.details() or "")
    code, errors = await worker.end()
    assert code == 1
    assert "signal 9" in errors.splitlines()[-1]


async def test_a_killed_front_ends_the_engine_and_leaves_nothing_behind(
    worker: Worker, tmp_path: Path
) -> None:
    # A descriptor of the process, to wait for the end of one that is not a child.
    descriptor = os.pidfd_open(worker.engine_pid)
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(descriptor, ended.set)
    worker.process.kill()
    await ended.wait()
    asyncio.get_running_loop().remove_reader(descriptor)
    os.close(descriptor)
    assert left_in(tmp_path) == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--model", "/nowhere"), ["--model /nowhere", "no such folder"]),
        (("--dtype", "float7"), ["float7"]),
        (("--host", "192.0.2.1"), ["--host 192.0.2.1"]),
    ],
)
async def test_what_cannot_be_done_is_one_line_and_exit_code_2(
    flags: tuple[str, str], words: list[str]
) -> None:
    process = await asyncio.create_subprocess_exec(
        *COMMAND,
        *flags,
        "--log-level",
        "ERROR",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    printed, errors = await process.communicate()
    assert process.returncode == 2
    assert printed == b""
    (line,) = errors.decode().splitlines()
    for word in ("djinn-worker: ", *words):
        assert word in line
