"""The program ``djinn-scheduler``."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence

from services.common import flags, process, telemetry
from services.scheduler import app
from services.scheduler.config import SchedulerConfig
from services.scheduler.policy.base import registry

_DEFAULTS = SchedulerConfig()


def parser() -> argparse.ArgumentParser:
    """Returns the program's parser."""
    made = flags.Parser(
        "djinn-scheduler",
        "Decides where agents' KV caches live: takes agents' phase signals, commands workers.",
    )
    flags.add_service_flags(made, port=_DEFAULTS.port, metrics_port=_DEFAULTS.metrics_port)
    made.add_argument(
        "--policy", choices=sorted(registry()), default=_DEFAULTS.policy, help="what decides"
    )
    made.add_argument(
        "--idle-threshold-seconds",
        type=flags.positive_float,
        default=_DEFAULTS.idle_threshold_s,
        metavar="S",
        help="a session whose client never signals counts as waiting after this long",
    )
    made.add_argument(
        "--command-timeout-seconds",
        type=flags.positive_float,
        default=_DEFAULTS.command_timeout_s,
        metavar="S",
        help="how long a worker has for a command before it is sent again",
    )
    made.add_argument(
        "--max-sessions",
        type=flags.positive_int,
        default=_DEFAULTS.max_sessions,
        metavar="N",
        help="most sessions open at once; no limit if not given",
    )
    return made


def config_of(args: argparse.Namespace) -> SchedulerConfig:
    """Returns what the flags said."""
    return SchedulerConfig(
        host=args.host,
        port=args.port,
        metrics_port=args.metrics_port,
        policy=args.policy,
        idle_threshold_s=args.idle_threshold_seconds,
        command_timeout_s=args.command_timeout_seconds,
        max_sessions=args.max_sessions,
        telemetry=flags.telemetry_config(args),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit code."""
    config = config_of(parser().parse_args(argv))

    async def serve(stop: asyncio.Event) -> int:
        instance = f"{config.host}:{config.port}"
        spans = telemetry.setup("djinn-scheduler", config.telemetry, instance)
        try:
            return await app.run(config, spans, stop)
        finally:
            spans.shutdown()

    return process.run("djinn-scheduler", serve)


if __name__ == "__main__":
    sys.exit(main())
