"""``djinn-scheduler simulate``: a trace of agents against modelled workers, in virtual time."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from services.common import flags
from services.common.errors import ConfigError
from services.scheduler.simulation import parameters, trace
from services.scheduler.simulation.parameters import WorkerParameters
from services.scheduler.simulation.result import RunFolder
from services.scheduler.simulation.run import TENANT, Options, Simulation, Summary

NAME = "simulate"
EXIT_OK = 0
EXIT_USAGE = 2
DEFAULT_PARAMETERS = "h200-llama-3-8b"


def parser() -> argparse.ArgumentParser:
    """Returns the subcommand's parser; it takes the scheduler's own flags too."""
    from services.scheduler import __main__ as scheduler

    made = scheduler.parser()
    made.prog = "djinn-scheduler simulate"
    made.description = (
        "Runs the scheduler in virtual time against modelled workers, with agents from a trace. It "
        "takes the scheduler's own flags too; ports and telemetry are not used."
    )
    made.add_argument("trace", type=Path, help="what the agents do (JSON lines)")
    made.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for the run's records"
    )
    made.add_argument(
        "--workers", type=flags.positive_int, default=1, metavar="N", help="modelled workers"
    )
    made.add_argument(
        "--params",
        default=DEFAULT_PARAMETERS,
        metavar="FILE",
        help=f"what a worker can do: a JSON file, or one of {', '.join(parameters.shipped())}",
    )
    made.add_argument(
        "--set",
        type=_setting,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a parameter in place of the file's, such as device_pool_bytes=8e9",
    )
    made.add_argument(
        "--step-results",
        type=Path,
        metavar="FILE",
        help="take step times from a result of `python -m bench step --json`",
    )
    made.add_argument(
        "--leave-when-done",
        action="store_true",
        help="agents close their sessions at once; else all stay until the last one is done",
    )
    made.add_argument(
        "--oracle", action="store_true", help="tell the scheduler how long each tool call takes"
    )
    made.add_argument(
        "--sample-seconds",
        type=flags.positive_float,
        default=1.0,
        metavar="S",
        help="virtual time between two records of the counters and pools",
    )
    made.add_argument(
        "--report-seconds",
        type=flags.positive_float,
        metavar="S",
        help="virtual time between two reports of a worker; if not given, the scheduler's own",
    )
    made.add_argument(
        "--until-seconds",
        type=flags.positive_float,
        metavar="S",
        help="stop at this virtual time; if not given, when all agents are done",
    )
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the subcommand and returns its exit code."""
    from services.scheduler.__main__ import config_of

    args = parser().parse_args(argv)
    try:
        worker = _parameters(args)
        agents = trace.read(args.trace)
        config = config_of(args)
        if args.report_seconds is not None:
            config = replace(config, report_interval_s=args.report_seconds)
        options = Options(
            workers=args.workers,
            live=not args.leave_when_done,
            oracle=args.oracle,
            sample_interval_s=args.sample_seconds,
            until_s=args.until_seconds,
        )
        folder = RunFolder(args.out)
        simulation = Simulation(agents, config, worker, options, folder)
        before = simulation.stats()
        summary = simulation.run()
        description = _description(args, worker, len(agents), before, summary)
        folder.finish(description | {"policy": simulation.coordinator.policy.name})
    except ConfigError as error:
        sys.stderr.write(f"djinn-scheduler simulate: {error}\n")
        return EXIT_USAGE
    sys.stderr.write(
        f"{len(agents)} agents on {args.workers} workers: {summary.virtual_s:.1f} virtual seconds "
        f"in {summary.wall_s:.1f} s, {summary.happenings} events\n"
    )
    return EXIT_OK


def _parameters(args: argparse.Namespace) -> WorkerParameters:
    found = parameters.load(args.params)
    data = msgspec.to_builtins(found)
    for key, value in args.set:
        *parents, last = key.split(".")
        where = data
        for parent in parents:
            where = where.get(parent) if isinstance(where, dict) else None
        if not isinstance(where, dict) or last not in where:
            raise ConfigError(f"--set {key}: there is no such parameter")
        where[last] = value
    if args.step_results is not None:
        data["step"]["rows"] = parameters.rows_from_bench(
            args.step_results, data["kv_bytes_per_token"], data["step"]["kv_read_bytes_per_s"]
        )
    try:
        found = msgspec.convert(data, WorkerParameters)
    except msgspec.ValidationError as error:
        raise ConfigError(f"--set: {error}") from None
    parameters.check(found, "parameters")
    return found


def _setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    try:
        decoded = msgspec.json.decode(value)
    except msgspec.DecodeError:
        return key, value
    whole = isinstance(decoded, float) and decoded.is_integer()
    return key, int(decoded) if whole else decoded


def _description(
    args: argparse.Namespace,
    worker: WorkerParameters,
    agents: int,
    before: dict[str, float],
    summary: Summary,
) -> dict[str, Any]:
    """Returns what the run was, as a real run's `run.json` has it; the same for the same input."""
    return {
        "schema_version": 1,
        "name": args.trace.stem,
        "config": {
            "workload": {
                "total_agents": agents,
                "replay": str(args.trace),
                "mode": "open" if args.leave_when_done else "live",
                "oracle": args.oracle,
            },
            "experiment": {"name": args.trace.stem},
        },
        "config_file": str(args.trace),
        "target": "simulation",
        "server": f"{args.workers} modelled workers",
        "model": {"model": worker.model, "parameters": msgspec.to_builtins(worker)},
        "tenant": TENANT,
        "labels": ["simulated", *(["oracle"] if args.oracle else [])],
        "start_unix_ns": 0,
        "clock": "virtual",
        "duration_s": round(summary.virtual_s, 6),
        "interrupted": summary.interrupted,
        "stats_before": before,
        "stats_after": summary.stats_after,
    }
