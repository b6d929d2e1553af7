"""``djinn-loadgen compare``: the same workload and seed on one system after the other."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

import msgspec

from loadgen import comparison, config, figure, flags, launch, preparation, progress, report, runner
from loadgen import systems as systems_of
from loadgen.comparison import Comparison, SystemResult
from loadgen.config import RunConfig
from loadgen.errors import RunFileError
from loadgen.progress import Progress
from loadgen.record import Record, read_requests, read_run
from loadgen.runner import RunOptions
from loadgen.systems import System

COMPARISON_FILE = "comparison.json"
FIGURE_FILE = "comparison.svg"
LOG_FILE = "server.log"


class CompareOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How to compare.

    Attributes:
        out: The comparison's folder; None: ``runs/<time>-compare-<name>``.
        processes: As in `RunOptions`.
        config_file: As in `RunOptions`.
        overrides: As in `RunOptions`.
    """

    out: Path | None = None
    processes: int = 0
    config_file: str = ""
    overrides: dict[str, str] = {}


def _folder(name: str, out: Path | None) -> Path:
    """Makes and returns a comparison's folder."""
    folder = preparation.run_folder(f"compare-{name}", out)
    if (folder / COMPARISON_FILE).exists():
        raise RunFileError(f"{folder}: holds a comparison already")
    return folder


async def compare(
    workload: RunConfig, systems: dict[str, System], options: CompareOptions, display: Progress
) -> Path:
    """Runs a workload on each system in turn; each is stopped before the next is started.

    Returns:
        The comparison's folder; in it, one run's folder for each system, by name.

    Raises:
        LoadgenError: A system did not come up, a run could not begin, or the folder holds a
            comparison already.
    """
    name = workload.experiment.name
    folder = _folder(name, options.out)
    results: list[SystemResult] = []
    for system_name, system in systems.items():
        out = preparation.run_folder(name, folder / system_name)
        async with launch.running(system_name, system, out / LOG_FILE, display.say) as server:
            chosen = RunOptions(
                server=server,
                target=system.target,
                openai=system.openai,
                out=out,
                processes=options.processes,
                config_file=options.config_file,
                overrides=options.overrides,
            )
            await runner.run(workload, chosen, display)
        results.append(_result(folder, system_name))
        load = workload.workload
        found = Comparison(name, load.seed, load.total_agents, tuple(results))
        # Written after each run: those that are done count, whatever becomes of the next.
        (folder / COMPARISON_FILE).write_bytes(comparison.to_json(found))
        if results[-1].interrupted:
            break
    return folder


def _result(folder: Path, name: str) -> SystemResult:
    run = folder / name
    computed = report.load(run)
    report.save(run, computed)
    return comparison.result(name, name, read_run(run), read_requests(run), computed)


def load(folder: Path) -> Comparison:
    """Reads a comparison's folder.

    Raises:
        RunFileError: It holds none, or it is broken.
    """
    path = folder / COMPARISON_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=Comparison)
    except OSError as error:
        raise RunFileError(f"{path}: {error.strerror}") from None
    except msgspec.DecodeError as error:
        raise RunFileError(f"{path}: not a comparison: {error}") from None


def draw(folder: Path, found: Comparison) -> Path:
    """Draws a comparison into its folder and returns the file."""
    runs: dict[str, list[Record]] = {s.name: read_requests(folder / s.run) for s in found.systems}
    path = folder / FIGURE_FILE
    figure.draw(f"{found.workload}: {found.agents} agents, seed {found.seed}", runs, path)
    return path


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the program's."""
    parser = commands.add_parser(
        "compare",
        help="run a workload on several systems in turn: one table and one figure",
        description="Runs the same workload and seed on one system after the other. Ratios are to "
        "the first.",
    )
    flags.add_workload(parser)
    parser.add_argument(
        "--systems",
        nargs="+",
        required=True,
        metavar="SYSTEM",
        help="FILE.yaml: all its systems; FILE.yaml:NAME: one of them; NAME=host:port: Djinn that "
        "runs there; NAME=http://...: an OpenAI-compatible server that runs there; NAME=COMMAND: "
        "Djinn, started so, with {port} for its port",
    )
    parser.add_argument("--out", type=Path, help="the folder (runs/<time>-compare-<name>)")
    parser.add_argument("--processes", type=flags.count, default=0, help="client processes")
    parser.add_argument("--no-figure", action="store_true", help="draw no figure")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    parser.set_defaults(command=command)


def command(arguments: argparse.Namespace) -> int:
    """Carries out the command; its exit code is 0 if every agent of every run succeeded."""
    systems = systems_of.parse_items(arguments.systems)
    overrides = flags.overrides(arguments)
    workload = config.load(arguments.config, overrides)
    if not arguments.no_figure:
        figure.check_available()
    options = CompareOptions(
        out=arguments.out,
        processes=arguments.processes,
        config_file=str(arguments.config),
        overrides=overrides,
    )
    console = progress.console()
    display = progress.make(console, quiet=arguments.quiet)
    try:
        folder = asyncio.run(compare(workload, systems, options, display))
    finally:
        display.close()
    found = load(folder)
    comparison.show(found, console)
    if not arguments.no_figure:
        console.print(f"\n{draw(folder, found)}", style="dim", highlight=False)
    console.print(f"{folder}", style="dim", highlight=False)
    if any(system.interrupted for system in found.systems):
        return 130
    return 0 if all(s.values["success_count"] == found.agents for s in found.systems) else 1
