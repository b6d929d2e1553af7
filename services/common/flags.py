"""Command-line flags that the services share, and types for flags with clear errors."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

from services.common.config import TelemetryConfig
from services.common.logs import LEVELS

_Number = TypeVar("_Number", int, float)


class _KnownDefaults(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a flag's default unless it is None, of which the help text tells what it means."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser whose help shows the defaults and whose errors are one line, exit code 2."""

    def __init__(self, prog: str, description: str) -> None:
        """Makes a parser.

        Args:
            prog: The program's name.
            description: One paragraph on what it is.
        """
        super().__init__(
            prog=prog,
            description=description,
            formatter_class=_KnownDefaults,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (see {self.prog} --help)\n")


def add_service_flags(
    parser: argparse.ArgumentParser, *, port: int, metrics_port: int, host: str = "127.0.0.1"
) -> None:
    """Adds ``--host --port --metrics-port --trace-file --log-level``.

    Args:
        parser: Where to add them.
        port: Default port of the gRPC services.
        metrics_port: Default port of the metrics.
        host: Default address to listen on.
    """
    parser.add_argument("--host", default=host, help="address to listen on")
    parser.add_argument("--port", type=port_number, default=port, help="gRPC port; 0: a free one")
    parser.add_argument(
        "--metrics-port",
        type=port_number,
        default=metrics_port,
        help="HTTP port of /metrics, /metrics/vmu and /healthz; 0: a free one",
    )
    add_telemetry_flags(parser)


def add_telemetry_flags(parser: argparse.ArgumentParser) -> None:
    """Adds ``--trace-file --log-level``; `telemetry_config` reads them."""
    parser.add_argument(
        "--trace-file",
        type=Path,
        metavar="FILE",
        help="append spans to this file as OTLP JSON lines; several processes may share one",
    )
    parser.add_argument(
        "--log-level", type=str.upper, choices=LEVELS, default="INFO", help="what to log on stderr"
    )


def telemetry_config(args: argparse.Namespace) -> TelemetryConfig:
    """Returns what ``--trace-file`` and ``--log-level`` said."""
    return TelemetryConfig(trace_file=args.trace_file, log_level=args.log_level)


def port_number(text: str) -> int:
    """Returns a port, 0 to 65535."""
    return _checked(text, int, lambda value: 0 <= value <= 65535, "a port from 0 to 65535")


def positive_int(text: str) -> int:
    """Returns a whole number of at least 1."""
    return _checked(text, int, lambda value: value >= 1, "a whole number of at least 1")


def non_negative_int(text: str) -> int:
    """Returns a whole number of at least 0."""
    return _checked(text, int, lambda value: value >= 0, "a whole number of at least 0")


def positive_float(text: str) -> float:
    """Returns a finite number above 0."""
    return _checked(text, float, lambda value: value > 0, "a number above 0")


def non_negative_float(text: str) -> float:
    """Returns a finite number of at least 0."""
    return _checked(text, float, lambda value: value >= 0, "a number of at least 0")


def fraction(text: str) -> float:
    """Returns a number from 0 to 1."""
    return _checked(text, float, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def host_port(text: str) -> str:
    """Returns ``host:port`` with a port from 1 to 65535; an IPv6 address stands in brackets."""
    host, colon, port = text.rpartition(":")
    is_bare_v6 = ":" in host and not (host.startswith("[") and host.endswith("]"))
    if not (colon and host and port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
        raise argparse.ArgumentTypeError(f"{text!r} is not host:port, such as localhost:5556")
    if is_bare_v6:
        raise argparse.ArgumentTypeError(f"{text!r}: an IPv6 address stands in brackets")
    return text


def _checked(
    text: str, parse: Callable[[str], _Number], allowed: Callable[[_Number], bool], what: str
) -> _Number:
    try:
        value = parse(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from None
    if not math.isfinite(value) or not allowed(value):
        raise argparse.ArgumentTypeError(f"{text} is not {what}")
    return value
