from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest

from services.common import flags


def parse(*argv: str) -> argparse.Namespace:
    parser = flags.Parser("djinn-test", "A test.")
    flags.add_service_flags(parser, port=5556, metrics_port=9095)
    parser.add_argument("--share", type=flags.fraction, default=0.5)
    return parser.parse_args(argv)


def test_defaults() -> None:
    args = parse()

    assert (args.host, args.port, args.metrics_port) == ("127.0.0.1", 5556, 9095)
    config = flags.telemetry_config(args)
    assert (config.trace_file, config.log_level) == (None, "INFO")


def test_telemetry_flags() -> None:
    config = flags.telemetry_config(parse("--trace-file=t.jsonl", "--log-level=debug"))

    assert (config.trace_file, config.log_level) == (Path("t.jsonl"), "DEBUG")


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--port=70000"], "argument --port: 70000 is not a port from 0 to 65535"),
        (["--port=http"], "argument --port: 'http' is not a port from 0 to 65535"),
        (["--share=1.5"], "argument --share: 1.5 is not a number from 0 to 1"),
        (["--share=nan"], "argument --share: nan is not a number from 0 to 1"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["--metrics"], "unrecognized arguments: --metrics"),
    ],
)
def test_an_error_is_one_line_with_value_and_limit(
    argv: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(*argv)

    assert caught.value.code == 2
    assert capsys.readouterr().err == f"djinn-test: {line} (see djinn-test --help)\n"


def test_help_shows_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("--help")

    assert caught.value.code == 0
    assert "(default: 5556)" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["localhost:5556", "10.0.0.1:1", "[::1]:65535"])
def test_an_address_is_taken_as_it_is(text: str) -> None:
    assert flags.host_port(text) == text


@pytest.mark.parametrize("text", ["", "localhost", ":5556", "h:", "h:0", "h:65536", "::1:5", "h:٣"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        flags.host_port(text)


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (flags.positive_int, "1", "0"),
        (flags.non_negative_int, "0", "-1"),
        (flags.positive_float, "0.1", "0"),
        (flags.positive_float, "1", "inf"),
        (flags.non_negative_float, "0", "-0.1"),
    ],
)
def test_numbers_have_limits(check: Callable[[str], float], good: str, bad: str) -> None:
    assert check(good) == float(good)
    with pytest.raises(argparse.ArgumentTypeError, match=bad):
        check(bad)
