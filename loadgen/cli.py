"""``djinn-loadgen``: run or simulate a workload, read a run again, verify a server, see traces."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from loadgen import (
    compare,
    config,
    flags,
    progress,
    replay,
    report,
    runner,
    simulate,
    sweep,
    trace,
    verify,
    workload,
)
from loadgen.errors import LoadgenError
from loadgen.spans import WAKE

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    given, passed_on = _split(sys.argv[1:] if argv is None else argv)
    arguments = _parser().parse_args(given)
    arguments.passed_on = passed_on
    try:
        return int(arguments.command(arguments))
    except LoadgenError as error:
        print(f"djinn-loadgen: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has had enough, as `head` has.
        sys.stderr.close()
        return EXIT_OK


def _split(given: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns what is for this program, and what `simulate` passes on: all after ``--``."""
    if "--" in given and given[0] == "simulate":
        place = list(given).index("--")
        return list(given[:place]), list(given[place + 1 :])
    return list(given), []


def _run(arguments: argparse.Namespace) -> int:
    overrides = flags.overrides(arguments)
    loaded = config.load(arguments.config, overrides)
    console = progress.console()
    # With --json standard output is the report alone.
    display = progress.make(progress.console(stderr=arguments.json), quiet=arguments.quiet)
    options = runner.RunOptions(
        server=flags.server(arguments),
        target=arguments.target,
        openai=flags.openai(arguments),
        out=arguments.out,
        processes=arguments.processes,
        trace=arguments.trace,
        record_tokens=arguments.record_tokens,
        config_file=str(arguments.config),
        overrides=overrides,
    )
    try:
        folder = asyncio.run(runner.run(loaded, options, display))
    finally:
        display.close()
    return _present(folder, console, as_json=arguments.json)


def _present(folder: Path, console: Console, *, as_json: bool) -> int:
    """Computes, saves and prints a run's report; the exit code says whether it is as expected."""
    result = report.load(folder)
    report.save(folder, result)
    if as_json:
        sys.stdout.buffer.write(report.to_json(result))
        sys.stdout.buffer.flush()
    else:
        report.show(result, console)
        console.print(f"\n{folder}", style="dim", highlight=False)
    if result.interrupted:
        return EXIT_INTERRUPTED
    return EXIT_OK if result.passed else EXIT_FAILED


def _report(arguments: argparse.Namespace) -> int:
    return _present(arguments.run, progress.console(), as_json=arguments.json)


def _verify(arguments: argparse.Namespace) -> int:
    options = verify.VerifyOptions(
        server=arguments.server,
        prompts=arguments.prompts,
        context_length=arguments.context_length,
        new_tokens=arguments.new_tokens,
        seed=arguments.seed,
    )
    console = progress.console()
    result = asyncio.run(verify.run(options, lambda text: console.print(text, highlight=False)))
    try:
        arguments.out.write_bytes(verify.to_json(result))
    except OSError as error:
        raise LoadgenError(f"--out {arguments.out}: {error.strerror}") from None
    verify.show(result, console)
    console.print(f"\n{arguments.out}", style="dim", highlight=False)
    return EXIT_OK if result.passed else EXIT_FAILED


def _trace(arguments: argparse.Namespace) -> int:
    files = trace.files_of(arguments.run, arguments.also)
    wakes = trace.slowest_wakes(trace.read(files), arguments.slowest)
    if not wakes:
        raise LoadgenError(f"no {WAKE} spans in {', '.join(map(str, files))}")
    console = progress.console()
    for number, spans in enumerate(wakes):
        if number:
            console.print()
        trace.waterfall(spans, console)
    return EXIT_OK


def _export(arguments: argparse.Namespace) -> int:
    loaded = config.load(arguments.config, flags.overrides(arguments))
    simulate.check_lengths(loaded.workload, str(arguments.config))
    for line in replay.write(workload.agent_shapes(loaded.workload)):
        sys.stdout.buffer.write(line)
    sys.stdout.buffer.flush()
    return EXIT_OK


def _simulate(arguments: argparse.Namespace) -> int:
    overrides = flags.overrides(arguments)
    loaded = config.load(arguments.config, overrides)
    options = simulate.SimulateOptions(
        out=arguments.out,
        workers=arguments.workers,
        policy=arguments.policy,
        params=arguments.params,
        scheduler=arguments.scheduler,
        more=tuple(arguments.passed_on),
        config_file=str(arguments.config),
        overrides=overrides,
    )
    folder = simulate.run(loaded, options)
    return _present(folder, progress.console(), as_json=arguments.json)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="djinn-loadgen",
        description="Drives agents that reason, act and reflect, and reports what they saw.",
        epilog="Exit codes: 0 all as expected; 1 something was not; 2 wrong use or no server; "
        "130 stopped.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run a workload and report on it")
    flags.add_target(run)
    run.add_argument("--out", type=Path, help="the run's folder (runs/<time>-<name>)")
    run.add_argument(
        "--processes", type=flags.count, default=0, help="client processes (by agents)"
    )
    flags.add_workload(run)
    run.add_argument("--trace", action="store_true", help="write the client's spans to the folder")
    run.add_argument(
        "--record-tokens", action="store_true", help="write the ids of generated tokens down"
    )
    run.add_argument("--json", action="store_true", help="print the report as JSON")
    run.add_argument("--quiet", action="store_true", help="show no progress")
    run.set_defaults(command=_run)

    simulated = commands.add_parser(
        "simulate",
        help="run a workload in virtual time, against a modelled server",
        description="Runs a workload through the scheduler's own simulator and reports on it. What "
        "follows -- goes to `djinn-scheduler simulate`, such as -- --policy-option prefetch=off.",
    )
    flags.add_workload(simulated)
    simulated.add_argument("--workers", type=flags.count, default=1, help="modelled workers (1)")
    simulated.add_argument("--policy", default="", help="the scheduler's policy (its default)")
    simulated.add_argument("--params", default="", help="what a worker can do (its default)")
    simulated.add_argument("--out", type=Path, help="the run's folder (runs/<time>-<name>)")
    simulated.add_argument(
        "--scheduler",
        default=simulate.SCHEDULER,
        metavar="PROGRAM",
        help="the scheduler's program (%(default)s)",
    )
    simulated.add_argument("--json", action="store_true", help="print the report as JSON")
    simulated.set_defaults(command=_simulate)

    export = commands.add_parser(
        "export", help="write a workload as a trace (JSON lines) to standard output"
    )
    flags.add_workload(export)
    export.set_defaults(command=_export)

    compare.add_parser(commands)
    sweep.add_parser(commands)

    again = commands.add_parser("report", help="compute a run's report again")
    again.add_argument("run", type=Path, help="the run's folder")
    again.add_argument("--json", action="store_true", help="print it as JSON")
    again.set_defaults(command=_report)

    check = commands.add_parser(
        "verify", help="compare a server's outputs with and without an evict and a restore"
    )
    check.add_argument("--server", default=flags.DEFAULT_SERVER, help="host:port (%(default)s)")
    check.add_argument("--prompts", type=flags.count, default=4, help="prompts (%(default)s)")
    check.add_argument(
        "--context-length", type=flags.count, default=256, help="tokens of each (%(default)s)"
    )
    check.add_argument(
        "--new-tokens", type=flags.count, default=16, help="tokens per generation (%(default)s)"
    )
    check.add_argument("--seed", type=flags.seed, default=0, help="of the prompts (%(default)s)")
    check.add_argument(
        "--out",
        type=Path,
        default=Path("correctness_results.json"),
        help="file to write (%(default)s)",
    )
    check.set_defaults(command=_verify)

    traces = commands.add_parser("trace", help="draw the slowest wakes of a run")
    traces.add_argument("run", type=Path, help="the run's folder, or a trace file")
    traces.add_argument("--slowest", type=flags.count, default=5, help="how many (%(default)s)")
    traces.add_argument(
        "--also", type=Path, action="append", default=[], help="another trace file, a server's say"
    )
    traces.set_defaults(command=_trace)
    return parser


if __name__ == "__main__":
    sys.exit(main())
