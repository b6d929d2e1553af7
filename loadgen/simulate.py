"""A workload in virtual time: to the scheduler's simulator as a trace, back from it as a run.

The simulator is part of the scheduler, whose code it runs, and the load generator imports no
service. So it is a process of its own, and what goes between the two are files.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import msgspec

from loadgen import environment, replay
from loadgen.config import Mode, Prompts, RunConfig, Workload
from loadgen.errors import LoadgenError, RunFileError
from loadgen.launch import find_program
from loadgen.preparation import run_folder
from loadgen.record import read_run, write_run
from loadgen.workload import agent_shapes

SCHEDULER = "djinn-scheduler"
TRACE_FILE = "trace.jsonl"


class SimulateOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How to simulate a workload.

    Attributes:
        out: The run's folder; None: ``runs/<time>-<name>``.
        workers: Modelled workers.
        policy: The scheduler's policy; empty: its default.
        params: What a worker can do, a file or a name that the scheduler knows; empty: its default.
        scheduler: The scheduler's program.
        more: Other flags of ``djinn-scheduler simulate``.
        config_file: Where the workload was read from, for the run's description.
        overrides: Values given on the command line, likewise.
    """

    out: Path | None = None
    workers: int = 1
    policy: str = ""
    params: str = ""
    scheduler: str = SCHEDULER
    more: tuple[str, ...] = ()
    config_file: str = ""
    overrides: dict[str, str] = {}


def check_lengths(workload: Workload, origin: str) -> None:
    """Checks that a workload's prompts have known lengths.

    Raises:
        LoadgenError: They are conversations.
    """
    if workload.prompts is Prompts.STORIES and not workload.replay:
        raise LoadgenError(
            f"{origin}: workload.prompts: stories have no known lengths in tokens; a trace needs "
            "prompts: tokens"
        )


def run(config: RunConfig, options: SimulateOptions) -> Path:
    """Simulates a workload.

    Args:
        config: The workload.
        options: How to simulate it.

    Returns:
        The run's folder, with its description and raw records as of a real run.

    Raises:
        LoadgenError: The workload cannot be simulated, or the scheduler could not do it.
    """
    check_lengths(config.workload, options.config_file or "workload")
    program = _program(options.scheduler)
    folder = run_folder(config.experiment.name, options.out)
    trace = folder / TRACE_FILE
    try:
        with trace.open("wb") as file:
            file.writelines(replay.write(agent_shapes(config.workload)))
    except OSError as error:
        raise RunFileError(f"{trace}: {error.strerror}") from None
    command = [program, "simulate", str(trace), "--out", str(folder)]
    command += ["--workers", str(options.workers)]
    for flag, value in (("--policy", options.policy), ("--params", options.params)):
        command += [flag, value] if value else []
    if config.workload.mode is not Mode.LIVE:
        command.append("--leave-when-done")
    if config.workload.oracle:
        command.append("--oracle")
    done = subprocess.run([*command, *options.more], check=False)
    if done.returncode:
        raise LoadgenError(f"{program} simulate ended with exit code {done.returncode}")
    _complete(folder, config, options)
    return folder


def _program(name: str) -> str:
    """Returns the path of the scheduler's program."""
    found = find_program(name)
    if found is None:
        raise LoadgenError(f"--scheduler {name}: no such program; is the extra installed?")
    return found


def _complete(folder: Path, config: RunConfig, options: SimulateOptions) -> None:
    """Adds to the run's description what only the load generator knows."""
    info = read_run(folder)
    write_run(
        folder,
        msgspec.structs.replace(
            info,
            name=config.experiment.name,
            config=config,
            config_file=options.config_file,
            overrides=options.overrides,
            versions=environment.versions(),
            git_commit=environment.git_commit(),
        ),
    )
