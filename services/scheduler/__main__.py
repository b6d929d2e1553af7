"""The program ``djinn-scheduler``."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence

from services.common import flags, process, telemetry
from services.common.errors import ConfigError
from services.scheduler import app, explain
from services.scheduler.config import SchedulerConfig
from services.scheduler.policy.base import policy_class, registry
from services.scheduler.policy.options import PolicyOptions, parse_options
from services.scheduler.simulation import cli as simulation

_DEFAULTS = SchedulerConfig()


def parser() -> argparse.ArgumentParser:
    """Returns the program's parser."""
    made = flags.Parser(
        "djinn-scheduler",
        "Decides where agents' KV caches live: takes agents' phase signals, commands workers. "
        f"'djinn-scheduler {explain.NAME} SESSION' asks one that runs why it does what it does.",
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
    made.add_argument(
        "--policy-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="tells the policy something, such as prefetch=off; may be given several times",
    )
    made.add_argument(
        "--tenant-quota",
        action="append",
        default=[],
        type=tenant_quota,
        metavar="TENANT=N",
        help="most sessions open at once of a tenant, *: of each one not named; may be given "
        "several times",
    )
    made.add_argument(
        "--max-queued",
        type=flags.non_negative_int,
        default=_DEFAULTS.max_queued,
        metavar="N",
        help="most clients whose place is kept while no more sessions are let in",
    )
    made.add_argument(
        "--priority-aging-seconds",
        type=flags.non_negative_float,
        default=_DEFAULTS.priority_aging_s,
        metavar="S",
        help="how long a wait for a session one point of priority is worth",
    )
    made.add_argument(
        "--session-ttl-s",
        type=flags.non_negative_float,
        default=_DEFAULTS.session_ttl_s,
        metavar="S",
        help="a session whose client gives no sign for this long is closed; 0: never",
    )
    return made


def tenant_quota(text: str) -> tuple[str, int]:
    """Returns a tenant and its quota."""
    tenant_id, equals, number = text.rpartition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form TENANT=N, such as acme=100")
    return tenant_id, flags.positive_int(number)


def config_of(args: argparse.Namespace) -> SchedulerConfig:
    """Returns what the flags said.

    Raises:
        ConfigError: They cannot all be right.
    """
    quotas: dict[str, int] = {}
    for tenant_id, quota in args.tenant_quota:
        if tenant_id in quotas:
            raise ConfigError(f"--tenant-quota {tenant_id}={quota}: given twice")
        quotas[tenant_id] = quota
    options = parse_options(
        args.policy_option, PolicyOptions(), args.policy, policy_class(args.policy).heeds
    )
    return SchedulerConfig(
        host=args.host,
        port=args.port,
        metrics_port=args.metrics_port,
        policy=args.policy,
        policy_options=options,
        tenant_quotas=quotas,
        max_queued=args.max_queued,
        priority_aging_s=args.priority_aging_seconds,
        idle_threshold_s=args.idle_threshold_seconds,
        command_timeout_s=args.command_timeout_seconds,
        max_sessions=args.max_sessions,
        session_ttl_s=args.session_ttl_s,
        telemetry=flags.telemetry_config(args),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit code.

    Args:
        argv: ``explain ...``, ``simulate ...``, or the server's flags; None: what the process was
            given.
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] == explain.NAME:
        return explain.main(argv[1:])
    if argv and argv[0] == simulation.NAME:
        return simulation.main(argv[1:])
    flags_parser = parser()
    args = flags_parser.parse_args(argv)
    try:
        config = config_of(args)
    except ConfigError as error:
        flags_parser.error(str(error))

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
