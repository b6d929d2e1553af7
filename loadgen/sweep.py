"""``djinn-loadgen sweep``: the largest population that a system serves at a service level."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Mapping
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from loadgen import config, flags, launch, population, progress, report, runner, service_level
from loadgen import systems as systems_of
from loadgen.config import Mode, RunConfig
from loadgen.errors import LoadgenError, RunFileError
from loadgen.expectations import Check
from loadgen.metrics import Report
from loadgen.preparation import run_folder
from loadgen.progress import Progress
from loadgen.record import RUN_FILE, read_run
from loadgen.runner import RunOptions
from loadgen.service_level import Term
from loadgen.systems import System

SWEEP_FILE = "sweep.json"
LOG_FILE = "server.log"
MOST_AGENTS = 65_536
TOLERANCE = 0.05


class SweepPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What is searched: ``sweep.json``. A folder is gone on with only for the same.

    Attributes:
        service_level: Every bound must hold, in every repeat.
        systems: What is searched through.
        config: The workload; each run has a population of its own, and keeps it live to the end.
        most: Largest population to try.
        tolerance: As in `population.next_population`.
        repeats: Runs of each population, with rising seeds.
        scale_arrivals: Arrivals come faster in proportion to the population.
    """

    service_level: tuple[Term, ...]
    systems: dict[str, System]
    config: RunConfig
    most: int = MOST_AGENTS
    tolerance: float = TOLERANCE
    repeats: int = 1
    scale_arrivals: bool = False


class Probe(msgspec.Struct, frozen=True):
    """One population that was tried.

    Attributes:
        agents: Its size.
        checks: The bounds, of each repeat in turn; the last is the first that failed, if one did.
        met: Whether all of them hold.
    """

    agents: int
    checks: tuple[tuple[Check, ...], ...]
    met: bool


class StoppedError(Exception):
    """Somebody stopped a run; the sweep can be gone on with."""


def probe_config(plan: SweepPlan, agents: int, repeat: int) -> RunConfig:
    """Returns the workload of one run.

    Every agent stays live to the end: of agents that leave when they are done, only as many are
    there at once as the arrival rate brings, whatever the population.
    """
    load = plan.config.workload
    scale = agents / load.total_agents if plan.scale_arrivals else 1.0
    workload = msgspec.structs.replace(
        load,
        total_agents=agents,
        arrival_rate=load.arrival_rate * scale,
        mode=Mode.LIVE,
        seed=load.seed + repeat,
    )
    return msgspec.structs.replace(plan.config, workload=workload)


def probe_folder(system: Path, agents: int, repeat: int) -> Path:
    """Returns the folder of one run, which need not exist."""
    return system / f"agents-{agents:06d}-{repeat}"


def _done(folder: Path) -> Report | None:
    """Returns the report of a run that came to its end; None: it did not, or never was."""
    if not (folder / RUN_FILE).exists():
        return None
    info = read_run(folder)
    return None if info.interrupted else report.load(folder)


class SystemSweep:
    """The search on one system.

    Args:
        name: The system's name.
        system: The system.
        plan: What is searched.
        folder: Where its runs go; those that are there already are not done again.
        processes: As in `RunOptions`.
        display: Shows what goes on.
    """

    def __init__(
        self,
        name: str,
        system: System,
        plan: SweepPlan,
        folder: Path,
        processes: int,
        display: Progress,
    ) -> None:
        self._name = name
        self._system = system
        self._plan = plan
        self._folder = folder
        self._processes = processes
        self._display = display
        self._server = ""
        self.probes: list[Probe] = []

    async def search(self) -> None:
        """Tries populations until the largest is known.

        Raises:
            LoadgenError: The system did not come up, or a run could not begin.
            StoppedError: A run was stopped.
        """
        # What has been done needs no server.
        agents = await self._advance()
        if agents is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        log = self._folder / LOG_FILE
        async with launch.running(self._name, self._system, log, self._display.say) as server:
            self._server = server
            await self._advance()

    async def _advance(self) -> int | None:
        """Tries populations, or only looks at the runs that are there while there is no server.

        Returns:
            The population for which a server is needed; None: the search has ended.
        """
        plan = self._plan
        while True:
            agents = population.next_population(
                {probe.agents: probe.met for probe in self.probes},
                start=plan.config.workload.total_agents,
                most=plan.most,
                tolerance=plan.tolerance,
            )
            if agents is None:
                return None
            probe = await self._probe(agents)
            if probe is None:
                return agents
            self.probes.append(probe)
            self._display.say(
                f"{self._name}: {agents} agents {'meet' if probe.met else 'miss'} the level"
            )

    async def _probe(self, agents: int) -> Probe | None:
        """Tries one population; None: a server is needed for that."""
        repeats: list[tuple[Check, ...]] = []
        for repeat in range(self._plan.repeats):
            folder = probe_folder(self._folder, agents, repeat)
            result = _done(folder)
            if result is None:
                if not self._server:
                    return None
                result = await self._run(agents, repeat, folder)
            checks = service_level.check(self._plan.service_level, result.aggregates)
            repeats.append(tuple(checks))
            if not service_level.met(checks):
                return Probe(agents, tuple(repeats), False)
        return Probe(agents, tuple(repeats), True)

    async def _run(self, agents: int, repeat: int, folder: Path) -> Report:
        _set_aside(folder)
        options = RunOptions(
            server=self._server,
            target=self._system.target,
            openai=self._system.openai,
            out=run_folder(self._plan.config.experiment.name, folder),
            processes=self._processes,
        )
        await runner.run(probe_config(self._plan, agents, repeat), options, self._display)
        result = report.load(folder)
        report.save(folder, result)
        if result.interrupted:
            raise StoppedError
        return result


def _set_aside(folder: Path) -> None:
    """Renames what a run that did not come to its end has left."""
    if not folder.exists():
        return
    number = 1
    while (aside := folder.with_name(f"{folder.name}.stopped-{number}")).exists():
        number += 1
    folder.rename(aside)


def begin(plan: SweepPlan, out: Path | None) -> Path:
    """Makes a sweep's folder, or checks that the one that is there is of the same sweep.

    Returns:
        The folder.

    Raises:
        RunFileError: It is of another sweep, is broken, or cannot be made.
    """
    folder = out
    if folder is None or not (folder / SWEEP_FILE).exists():
        folder = run_folder(f"sweep-{plan.config.experiment.name}", folder)
        _write(folder, plan, {})
        return folder
    path = folder / SWEEP_FILE
    try:
        there = msgspec.json.decode(path.read_bytes(), type=_SweepFile).plan
    except (OSError, msgspec.DecodeError) as error:
        raise RunFileError(f"{path}: not a sweep: {error}") from None
    for name in SweepPlan.__struct_fields__:
        if getattr(there, name) != getattr(plan, name):
            raise RunFileError(f"{folder}: holds a sweep with another {name.replace('_', ' ')}")
    return folder


class _SweepFile(msgspec.Struct, frozen=True):
    plan: SweepPlan
    largest: dict[str, int] = {}
    probes: dict[str, list[Probe]] = {}


def _write(folder: Path, plan: SweepPlan, probes: dict[str, list[Probe]]) -> None:
    content = _SweepFile(plan, {name: largest_of(found) for name, found in probes.items()}, probes)
    text = msgspec.json.format(msgspec.json.encode(content), indent=2)
    (folder / SWEEP_FILE).write_bytes(text + b"\n")


def largest_of(probes: list[Probe]) -> int:
    """Returns the largest population that meets the level; 0: none did."""
    return population.largest({probe.agents: probe.met for probe in probes})


async def sweep(
    plan: SweepPlan, folder: Path, processes: int, display: Progress
) -> dict[str, list[Probe]]:
    """Searches each system in turn.

    Returns:
        The populations that were tried, by system.

    Raises:
        LoadgenError: A system did not come up, or a run could not begin.
        StoppedError: A run was stopped.
    """
    found: dict[str, list[Probe]] = {}
    for name, system in plan.systems.items():
        one = SystemSweep(name, system, plan, folder / name, processes, display)
        found[name] = one.probes
        try:
            await one.search()
        finally:
            _write(folder, plan, found)
    return found


def show(plan: SweepPlan, found: Mapping[str, list[Probe]], console: Console) -> None:
    """Prints a sweep's results."""
    level = ", ".join(map(str, plan.service_level))
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("system", style="cyan", no_wrap=True)
    for name in ("agents", *map(str, plan.service_level)):
        table.add_column(name, justify="right")
    table.add_column("level")
    for system, probes in found.items():
        for probe in sorted(probes, key=lambda probe: probe.agents):
            # Of several repeats, the last one: the one that failed, if one did.
            values = (f"{c.value:,.5g}" if c.value is not None else "n/a" for c in probe.checks[-1])
            verdict = "[green]met[/]" if probe.met else "[red]missed[/]"
            table.add_row(system, f"{probe.agents:,}", *values, verdict)
    console.print(table, highlight=False)
    for system, probes in found.items():
        largest = largest_of(probes)
        said = f"at most {largest:,} agents meet" if largest else "no population tried meets"
        console.print(f"{system}: {said} {level}", highlight=False, style="bold")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the program's."""
    parser = commands.add_parser(
        "sweep",
        help="find the largest population that is served at a service level",
        description="Doubles the workload's total_agents while the level is met, then bisects. "
        "Every agent stays live to the end of its run. With --out of an earlier sweep that was "
        "stopped, what has been run is not run again.",
    )
    flags.add_workload(parser)
    parser.add_argument(
        "--service-level",
        required=True,
        metavar="BOUNDS",
        help="such as p99_wake_ms<=250,p99_request_ms<=2000,failed<=0",
    )
    flags.add_target(parser)
    parser.add_argument(
        "--systems",
        nargs="+",
        metavar="SYSTEM",
        help="systems to search in turn, in place of --target and --server; as with compare",
    )
    parser.add_argument("--repeats", type=flags.count, default=1, help="runs of each (%(default)s)")
    parser.add_argument(
        "--max-agents", type=flags.count, default=MOST_AGENTS, help="try no more (%(default)s)"
    )
    parser.add_argument(
        "--tolerance",
        type=_share,
        default=TOLERANCE,
        help="how close the largest met and the smallest missed shall be (%(default)s)",
    )
    parser.add_argument(
        "--scale-arrivals",
        action="store_true",
        help="arrivals come faster in proportion to the population, so that all take equally long",
    )
    parser.add_argument("--out", type=Path, help="the folder (runs/<time>-sweep-<name>)")
    parser.add_argument("--processes", type=flags.count, default=0, help="client processes")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    parser.set_defaults(command=command)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < 1.0:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to below 1, got {text!r}")
    return value


def _systems(arguments: argparse.Namespace) -> dict[str, System]:
    if arguments.systems:
        return systems_of.parse_items(arguments.systems)
    system = System(
        target=arguments.target, server=flags.server(arguments), openai=flags.openai(arguments)
    )
    return {arguments.target: system}


def command(arguments: argparse.Namespace) -> int:
    """Carries out the command; its exit code is 0 if some population meets the level everywhere."""
    terms = service_level.parse(arguments.service_level)
    workload = config.load(arguments.config, flags.overrides(arguments))
    if workload.workload.replay:
        raise LoadgenError(f"{arguments.config}: a replay's population is that of its trace")
    plan = SweepPlan(
        service_level=terms,
        systems=_systems(arguments),
        config=workload,
        most=arguments.max_agents,
        tolerance=arguments.tolerance,
        repeats=arguments.repeats,
        scale_arrivals=arguments.scale_arrivals,
    )
    folder = begin(plan, arguments.out)
    console = progress.console()
    display = progress.make(console, quiet=arguments.quiet)
    try:
        found = asyncio.run(sweep(plan, folder, arguments.processes, display))
    except StoppedError:
        console.print(f"stopped; go on with --out {folder}", highlight=False)
        return 130
    finally:
        display.close()
    show(plan, found, console)
    console.print(f"\n{folder}", style="dim", highlight=False)
    return 0 if all(largest_of(probes) for probes in found.values()) else 1
