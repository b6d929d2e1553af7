"""A whole run: checks that it can be done, drives the client processes, and writes its files."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import secrets
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from loadgen import client_process, counters, environment
from loadgen.client_process import (
    Batch,
    ClientJob,
    Drained,
    Failed,
    Finished,
    FromChild,
    Ready,
    Release,
    Start,
    Stop,
    ToChild,
)
from loadgen.config import Mode, RunConfig
from loadgen.errors import ServerError
from loadgen.preparation import check_fits, default_processes, run_folder
from loadgen.progress import Progress, Tally
from loadgen.record import (
    REQUESTS_FILE,
    LoopLag,
    RunInfo,
    StatsRecord,
    decode_lines,
    encode,
    write_run,
)
from loadgen.targets import registry
from loadgen.targets.base import Target, TargetError, TargetInfo
from loadgen.targets.options import OpenAIOptions

STATS_INTERVAL_S = 1.0
START_DELAY_S = 0.2
STOP_GRACE_S = 20.0
TRACE_FILE = "traces-client.jsonl"


class RunOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How to run a workload.

    Attributes:
        server: host:port or URL of what is driven.
        target: Its kind.
        openai: How to speak to an OpenAI-compatible server.
        out: The run's folder; None: ``runs/<time>-<name>``.
        processes: Client processes; 0 chooses by agents and cores.
        trace: Write the client's spans into the run's folder.
        record_tokens: Write the ids of generated tokens down.
        config_file: Where the workload was read from, for the run's description.
        overrides: Values given on the command line, likewise.
    """

    server: str = "localhost:5556"
    target: str = "djinn"
    openai: OpenAIOptions = OpenAIOptions()
    out: Path | None = None
    processes: int = 0
    trace: bool = False
    record_tokens: bool = False
    config_file: str = ""
    overrides: dict[str, str] = {}


async def run(config: RunConfig, options: RunOptions, progress: Progress) -> Path:
    """Runs a workload.

    Args:
        config: The workload.
        options: How to run it.
        progress: Shows what goes on.

    Returns:
        The run's folder, with its description and raw events.

    Raises:
        LoadgenError: The run could not begin.
    """
    target = await registry.connect(options.target, options.server, openai=options.openai)
    try:
        info = await _ask(target, options)
        check_fits(config.workload, info, options.config_file or "workload")
        folder = run_folder(config.experiment.name, options.out)
        return await Runner(config, options, target, info, folder, progress).run()
    finally:
        await target.aclose()


async def _ask(target: Target, options: RunOptions) -> TargetInfo:
    try:
        return await target.info()
    except TargetError as error:
        raise ServerError(f"--server {options.server}: {error.message}") from None


class _Child:
    """The parent's side of one client process."""

    def __init__(self, job: ClientJob) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.number = job.process
        self.process = context.Process(
            target=client_process.main,
            args=(job, theirs),
            name=f"djinn-loadgen-client-{job.process}",
            daemon=True,
        )
        self.process.start()
        theirs.close()
        self.ready = False
        self.drained = False
        self.ended = False
        self.lag: LoopLag | None = None

    def send(self, message: ToChild) -> None:
        # A child that has gone is seen where its pipe is read.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send_bytes(msgspec.msgpack.encode(message))


class Runner:
    """One run; see `run`."""

    def __init__(
        self,
        config: RunConfig,
        options: RunOptions,
        target: Target,
        target_info: TargetInfo,
        folder: Path,
        progress: Progress,
    ) -> None:
        self._config = config
        self._options = options
        self._target = target
        self._target_info = target_info
        self._folder = folder
        self._progress = progress
        # Random prompts are the same in each run of a seed: in a tenant of its own, a run finds no
        # KV of an earlier one, while its agents still share what they have in common.
        self._tenant = config.workload.tenant or f"run-{secrets.token_hex(8)}"
        self._tally = Tally(config.workload.total_agents)
        self._decoder: msgspec.msgpack.Decoder[FromChild] = msgspec.msgpack.Decoder(FromChild)
        self._children: list[_Child] = []
        self._changed = asyncio.Event()
        self._interrupted = False
        self._failure = ""
        self._start_ns = 0
        self._end_s = 0.0

    async def run(self) -> Path:
        workload = self._config.workload
        count = self._options.processes or default_processes(workload.total_agents)
        count = min(count, workload.total_agents)
        before = await self._stats()
        with (
            (self._folder / REQUESTS_FILE).open("wb") as self._file,
            self._signals(),
        ):
            try:
                self._spawn(count)
                await self._until(lambda child: child.ready)
                if self._failure:
                    raise ServerError(self._failure)
                self._start_ns = time.monotonic_ns() + round(START_DELAY_S * 1e9)
                info = self._describe(before, count)
                write_run(self._folder, info)
                await self._go()
            finally:
                await self._end_children()
        # A target without counters has none to wait for.
        after, settled = await counters.settled(self._stats) if before else ({}, True)
        if not settled:
            self._progress.say("the server's counters may lack the end of the run")
        write_run(
            self._folder,
            msgspec.structs.replace(
                info,
                duration_s=self._end_s,
                loop_lag=[child.lag for child in self._children if child.lag is not None],
                lost_processes=sum(child.lag is None for child in self._children),
                interrupted=self._interrupted,
                stats_after=after,
                stats_settled=settled,
            ),
        )
        return self._folder

    def _spawn(self, count: int) -> None:
        workload = self._config.workload
        self._progress.say(
            f"{workload.total_agents} agents on {count} client process"
            f"{'es' if count > 1 else ''}, results in {self._folder}"
        )
        trace_file = str(self._folder / TRACE_FILE) if self._options.trace else ""
        loop = asyncio.get_running_loop()
        for number in range(count):
            child = _Child(
                ClientJob(
                    workload=workload,
                    vocab_size=self._target_info.vocab_size,
                    target=self._options.target,
                    server=self._options.server,
                    openai=self._options.openai,
                    process=number,
                    processes=count,
                    trace_file=trace_file,
                    tenant=self._tenant,
                    record_tokens=self._options.record_tokens,
                )
            )
            self._children.append(child)
            loop.add_reader(child.connection.fileno(), self._receive, child)

    async def _go(self) -> None:
        """Runs from the start to the end of the last agent."""
        for child in self._children:
            child.send(Start(self._start_ns))
        sampler = asyncio.create_task(self._sample())
        try:
            await self._until(lambda child: child.drained)
            if self._config.workload.mode is Mode.LIVE:
                for child in self._children:
                    child.send(Release())
            await self._until(lambda child: False)
        finally:
            self._end_s = self._now()
            sampler.cancel()
            await asyncio.gather(sampler, return_exceptions=True)

    async def _until(self, reached: Callable[[_Child], bool]) -> None:
        """Waits until each child has reached something or ended, or the run is to stop."""
        while not all(child.ended or reached(child) for child in self._children):
            self._changed.clear()
            await self._changed.wait()

    async def _end_children(self) -> None:
        """Has every child finish, and ends those that do not."""
        loop = asyncio.get_running_loop()
        for child in self._children:
            child.send(Stop())
        try:
            async with asyncio.timeout(STOP_GRACE_S):
                await self._until(lambda child: False)
        except TimeoutError:
            for child in self._children:
                child.process.kill()
        for child in self._children:
            if not child.ended:
                loop.remove_reader(child.connection.fileno())
            child.connection.close()
            await asyncio.to_thread(child.process.join)

    def _receive(self, child: _Child) -> None:
        try:
            message = self._decoder.decode(child.connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            self._end(child)
            return
        match message:
            case Ready():
                child.ready = True
            case Failed(text):
                self._failure = self._failure or text
            case Batch(lines, states):
                self._file.write(lines)
                self._file.flush()
                self._tally.set_states(child.number, states)
                for record in decode_lines(lines, "client process"):
                    self._tally.add(record)
                self._show()
            case Drained():
                child.drained = True
            case Finished(lag):
                child.lag = lag
        self._changed.set()

    def _end(self, child: _Child) -> None:
        asyncio.get_running_loop().remove_reader(child.connection.fileno())
        child.ended = True
        if child.lag is None and not self._failure:
            self._failure = f"client process {child.number} ended before its work did"
            self._progress.say(self._failure)
        self._changed.set()

    def _show(self) -> None:
        self._tally.now_s = max(0.0, self._now())
        self._progress.update(self._tally)

    def _now(self) -> float:
        return (time.monotonic_ns() - self._start_ns) * 1e-9

    async def _sample(self) -> None:
        """Writes the server's counters and pools down at regular times."""
        while True:
            await asyncio.sleep(STATS_INTERVAL_S)
            now_s = self._now()
            stats = await self._stats()
            if stats:
                self._file.write(encode([StatsRecord(now_s, stats)]))
                self._file.flush()
                self._tally.set_stats(stats)
            self._show()

    async def _stats(self) -> dict[str, float]:
        try:
            return await self._target.stats()
        except TargetError:
            # The scheduler may be away for a while: agents live on, and so does the run.
            return {}

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Has Ctrl-C and SIGTERM stop the agents, so that the run still ends in a report."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._interrupt)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    def _interrupt(self) -> None:
        if not self._interrupted:
            self._interrupted = True
            self._progress.say("stopping: agents close their sessions")
            for child in self._children:
                child.send(Stop())

    def _describe(self, before: dict[str, float], count: int) -> RunInfo:
        workload = self._config.workload
        offset_ns = time.time_ns() - time.monotonic_ns()
        return RunInfo(
            name=self._config.experiment.name,
            config=self._config,
            config_file=self._options.config_file,
            overrides=self._options.overrides,
            target=self._options.target,
            server=self._options.server,
            model=self._target_info.model,
            policy=self._target_info.policy,
            tenant=self._tenant,
            labels=["oracle"] if workload.oracle else [],
            start_unix_ns=self._start_ns + offset_ns,
            processes=count,
            interrupted=True,
            stats_before=before,
            versions=environment.versions(),
            machine=environment.machine(),
            git_commit=environment.git_commit(),
        )
