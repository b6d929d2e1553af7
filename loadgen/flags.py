"""What several commands' lines have in common."""

from __future__ import annotations

import argparse
from pathlib import Path

from loadgen.errors import LoadgenError
from loadgen.targets import registry
from loadgen.targets.options import DEFAULT_VOCAB_SIZE, OpenAIOptions

DEFAULT_SERVER = "localhost:5556"


def count(text: str) -> int:
    """Returns a whole number, at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number, at least 1, got {text!r}")
    return value


def seed(text: str) -> int:
    """Returns a whole number, at least 0."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected a whole number, at least 0, got {text!r}")
    return int(text)


def _setting(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    return key, value


def add_workload(parser: argparse.ArgumentParser) -> None:
    """Adds the workload file, and the flags that take the place of values in it."""
    parser.add_argument("config", type=Path, help="workload file (YAML)")
    parser.add_argument("--seed", type=seed, help="in place of the workload's")
    parser.add_argument(
        "--set",
        type=_setting,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a value in place of the file's, such as workload.total_agents=20",
    )


def overrides(arguments: argparse.Namespace) -> dict[str, str]:
    """Returns the values of `add_workload`'s flags, by dotted key."""
    found: dict[str, str] = dict(arguments.set)
    if arguments.seed is not None:
        found["workload.seed"] = str(arguments.seed)
    return found


def add_target(parser: argparse.ArgumentParser) -> None:
    """Adds what is driven, and where it is."""
    parser.add_argument(
        "--target", default="djinn", choices=registry.NAMES, help="what is driven (%(default)s)"
    )
    parser.add_argument(
        "--server", "--url", help=f"host:port of Djinn ({DEFAULT_SERVER}), or the other's URL"
    )
    openai = parser.add_argument_group("with --target openai")
    openai.add_argument("--model", default="", help="its name there (the first that is listed)")
    openai.add_argument(
        "--openai-text", action="store_true", help="send words, where token ids are not accepted"
    )
    openai.add_argument(
        "--vocab-size",
        type=count,
        default=DEFAULT_VOCAB_SIZE,
        help="token ids that prompts are drawn from (%(default)s)",
    )


def server(arguments: argparse.Namespace) -> str:
    """Returns where the target of `add_target` is.

    Raises:
        LoadgenError: Nobody said where, and there is no usual place.
    """
    if arguments.server:
        return str(arguments.server)
    if arguments.target == "djinn":
        return DEFAULT_SERVER
    raise LoadgenError(f"--target {arguments.target} needs --url, such as http://localhost:8000")


def openai(arguments: argparse.Namespace) -> OpenAIOptions:
    """Returns how to speak to an OpenAI-compatible server."""
    return OpenAIOptions(
        model=arguments.model, text=arguments.openai_text, vocab_size=arguments.vocab_size
    )
