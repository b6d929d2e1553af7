"""One client process: runs its share of the agents on its own event loop.

Parent and child speak over a pipe, in msgpack. The child says `Ready`, waits for `Start`, sends
`Batch` after `Batch`, says `Drained` when its agents have done their work, and `Finished` at the
end. A parent that goes away ends the child.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from djinn_client import tracing
from loadgen.agent import AgentRun, State
from loadgen.config import Mode, Workload
from loadgen.errors import LoadgenError
from loadgen.pacer import LagProbe, RunClock, due_agents
from loadgen.record import LoopLag, Record, encode
from loadgen.targets import registry
from loadgen.targets.base import Target
from loadgen.targets.options import OpenAIOptions
from loadgen.workload import AgentPlan, plan

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

BATCH_INTERVAL_S = 0.2
SWITCH_INTERVAL_S = 0.0002
"""How long the loop waits at most for a thread of its process, such as the one that writes spans;
Python's own 5 ms would be part of every time taken meanwhile."""


class ClientJob(msgspec.Struct, frozen=True):
    """What one client process has to do.

    Attributes:
        workload: The whole workload.
        vocab_size: Number of token ids of the model.
        target: Name of the target.
        server: Where it is.
        process: Number of this process, from 0.
        processes: How many there are.
        trace_file: File to append spans to; empty: only where OTEL_* variables say.
        tenant: Whose agents they are.
        record_tokens: Write the ids of generated tokens down.
        openai: How to speak to an OpenAI-compatible server.
    """

    workload: Workload
    vocab_size: int
    target: str
    server: str
    process: int = 0
    processes: int = 1
    trace_file: str = ""
    tenant: str = ""
    record_tokens: bool = False
    openai: OpenAIOptions = OpenAIOptions()


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The child is connected and has its plans."""


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The child cannot do its work."""

    message: str


class Batch(msgspec.Struct, frozen=True, tag=True):
    """Records as JSON lines, and how many agents are in each state."""

    lines: bytes
    states: dict[str, int]


class Drained(msgspec.Struct, frozen=True, tag=True):
    """The child's agents have done their work; in live mode their sessions are still open."""


class Finished(msgspec.Struct, frozen=True, tag=True):
    """All sessions are closed and all records sent."""

    lag: LoopLag


class Start(msgspec.Struct, frozen=True, tag=True):
    """Run; the start is given as `time.monotonic_ns` tells it."""

    start_ns: int


class Release(msgspec.Struct, frozen=True, tag=True):
    """The last agent anywhere is done: close the sessions."""


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Give up: close the sessions and finish."""


FromChild = Ready | Failed | Batch | Drained | Finished
ToChild = Start | Release | Stop


def main(job: ClientJob, connection: Connection) -> None:
    """Runs a client process; the entry point of the spawned process."""
    # The parent is told by the terminal as well, and ends its children in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    # The threads that write spans are the provider's; gRPC's, which belong to the loop, come later.
    _run_in_real_time(0)
    provider = _tracer_provider(job)
    _run_in_real_time(1)
    with contextlib.suppress(BrokenPipeError):
        asyncio.run(ClientProcess(job, connection, provider).run())


def _run_in_real_time(rank: int) -> None:
    """Has this thread, and those it starts from now on, wait for no ordinary process.

    Where cores are few, nearly all of a loop's lag is time for which the kernel has it stand back
    in the middle of a callback. A real-time thread is not interrupted by ordinary ones; that takes
    a privilege, and without it all stays as it is.

    Args:
        rank: A thread of a higher rank goes before one of a lower; from 0.
    """
    priority = os.sched_param(os.sched_get_priority_min(os.SCHED_RR) + rank)
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_RR, priority)


class ClientProcess:
    """The child's side; see the module's description.

    Args:
        job: What it has to do.
        connection: The pipe to the parent.
        provider: Records spans, and is shut down at the end; None: none are recorded.
    """

    def __init__(
        self, job: ClientJob, connection: Connection, provider: TracerProvider | None
    ) -> None:
        self._job = job
        self._provider = provider
        self._connection = connection
        self._decoder: msgspec.msgpack.Decoder[ToChild] = msgspec.msgpack.Decoder(ToChild)
        self._records: list[Record] = []
        self._states: Counter[State] = Counter()
        self._at_work = 0
        self._started = asyncio.Event()
        self._start_ns = 0
        self._release = asyncio.Event()
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """Connects, runs the agents when told to, and reports."""
        try:
            target = await registry.connect(
                self._job.target,
                self._job.server,
                tenant=self._job.tenant,
                tracer_provider=self._provider,
                openai=self._job.openai,
            )
        except LoadgenError as error:
            self._send(Failed(str(error)))
            return
        loop = asyncio.get_running_loop()
        loop.add_reader(self._connection.fileno(), self._receive)
        try:
            await self._drive(target)
        finally:
            loop.remove_reader(self._connection.fileno())
            await target.aclose()
            if self._provider is not None:
                await asyncio.to_thread(self._provider.shutdown)

    async def _drive(self, target: Target) -> None:
        job = self._job
        plans = plan(job.workload, job.vocab_size, job.process, job.processes)
        self._at_work = len(plans)
        # A collection would stop the loop for longer than what is measured; plans stay anyway.
        gc.collect()
        gc.freeze()
        self._send(Ready())
        stopping = asyncio.create_task(self._stop.wait())
        await _first(asyncio.create_task(self._started.wait()), stopping)
        probe = LagProbe(job.process)
        probe.start()
        flusher = asyncio.create_task(self._flush_regularly())
        await _first(asyncio.create_task(self._run_agents(plans, target)), stopping)
        await _cancel(stopping, flusher)
        self._flush()
        self._send(Finished(probe.stop()))

    async def _run_agents(self, plans: Sequence[AgentPlan], target: Target) -> None:
        workload = self._job.workload
        clock = RunClock(self._start_ns)
        async with asyncio.TaskGroup() as group:
            async for agent in due_agents(plans, clock):
                run = AgentRun(
                    agent,
                    target,
                    clock,
                    self._records.append,
                    self._states,
                    timeout_s=workload.request_timeout_s,
                    oracle=workload.oracle,
                    on_work_done=self._one_is_done,
                    release=self._release if workload.mode is Mode.LIVE else None,
                    record_tokens=self._job.record_tokens,
                )
                group.create_task(run.run())

    def _one_is_done(self) -> None:
        self._at_work -= 1
        if self._at_work == 0:
            self._flush()
            self._send(Drained())

    async def _flush_regularly(self) -> None:
        while True:
            await asyncio.sleep(BATCH_INTERVAL_S)
            self._flush()

    def _flush(self) -> None:
        states = {state.value: count for state, count in self._states.items() if count}
        self._send(Batch(encode(self._records), states))
        self._records.clear()

    def _send(self, message: FromChild) -> None:
        self._connection.send_bytes(msgspec.msgpack.encode(message))

    def _receive(self) -> None:
        try:
            message = self._decoder.decode(self._connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            asyncio.get_running_loop().remove_reader(self._connection.fileno())
            self._stop.set()
            return
        match message:
            case Start(start_ns):
                self._start_ns = start_ns
                self._started.set()
            case Release():
                self._release.set()
            case Stop():
                self._stop.set()


async def _first(work: asyncio.Task[Any], stopping: asyncio.Task[Any]) -> None:
    """Waits for `work`, or cancels it once `stopping` is done; returns when `work` has ended."""
    await asyncio.wait({work, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not work.done():
        await _cancel(work)
    elif not work.cancelled():
        work.result()


async def _cancel(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _tracer_provider(job: ClientJob) -> TracerProvider | None:
    return tracing.tracer_provider(
        "djinn-loadgen",
        instance=f"client-{job.process}",
        trace_file=Path(job.trace_file) if job.trace_file else None,
    )
