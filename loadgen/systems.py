"""The systems that a workload is compared on: named, described in a file or on the command line."""

from __future__ import annotations

import os
import re
import shlex
import string
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import yaml

from loadgen import config_problems as problems
from loadgen.errors import LoadgenError, WorkloadError
from loadgen.targets.options import OpenAIOptions

DEFAULT_SERVERS = {"djinn": "localhost:{port}", "openai": "http://localhost:{port}"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HOST_PORT = re.compile(r"[A-Za-z0-9._-]+:\d+|\[[0-9A-Fa-f:]+\]:\d+")


class System(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One system: how it is started, if it is, and how it is reached.

    In `command` and `server`, ``{port}`` stands for a free port. In `command`, ``{python}`` is this
    Python, and ``$NAME`` or ``${NAME}`` a variable of the environment.

    Attributes:
        command: Starts the server; empty: it runs already, at `server`.
        target: ``"djinn"`` or ``"openai"``.
        server: host:port or URL; empty: this machine, at ``{port}``.
        openai: How to speak to an OpenAI-compatible server.
        env: Variables that the command gets beside this process's own.
        ready_timeout_s: Most seconds from its start until it can serve.
    """

    command: str = ""
    target: Literal["djinn", "openai"] = "djinn"
    server: str = ""
    openai: OpenAIOptions = OpenAIOptions()
    env: dict[str, str] = {}
    ready_timeout_s: Annotated[float, msgspec.Meta(gt=0.0)] = 600.0


def parse_items(items: Sequence[str]) -> dict[str, System]:
    """Returns the systems of a command line, in order.

    Args:
        items: Each one a file of systems (``FILE.yaml``), one system of it (``FILE.yaml:NAME``), a
            system that runs already (``NAME=host:port`` is Djinn, ``NAME=http://...`` is
            OpenAI-compatible), or Djinn by its command (``NAME=djinn-server --port {port} ...``).

    Raises:
        LoadgenError: An item is none of these, a file is malformed or lacks a system, or a name is
            given twice.
    """
    found: dict[str, System] = {}
    for item in items:
        for name, system in _parse_item(item).items():
            if name in found:
                raise LoadgenError(f"--systems {item}: {name} is given twice")
            found[name] = system
    return found


def _parse_item(item: str) -> dict[str, System]:
    name, equals, value = item.partition("=")
    if equals and _NAME.fullmatch(name):
        return {name: _inline(item, value.strip())}
    path, colon, wanted = item.rpartition(":")
    if colon and path.endswith((".yaml", ".yml")):
        systems = load(Path(path))
        if wanted not in systems:
            hint = problems.hint(wanted, tuple(systems))
            raise LoadgenError(f"--systems {item}: unknown system {wanted}{hint}")
        return {wanted: systems[wanted]}
    if item.endswith((".yaml", ".yml")):
        return load(Path(item))
    raise LoadgenError(
        f"--systems {item}: unknown system; expected FILE.yaml, FILE.yaml:NAME, NAME=host:port, "
        "NAME=http://... or NAME=COMMAND"
    )


def _inline(item: str, value: str) -> System:
    if not value:
        raise LoadgenError(f"--systems {item}: expected an address or a command after =")
    if value.startswith(("http://", "https://")):
        return System(target="openai", server=value)
    if _HOST_PORT.fullmatch(value):
        return System(server=value)
    system = System(command=value)
    _check(f"--systems {item}", system)
    return system


def load(path: Path) -> dict[str, System]:
    """Reads a file of systems: a YAML mapping of names to the fields of `System`.

    Raises:
        WorkloadError: The file cannot be read, or is malformed; the message has file, line and key.
    """
    origin = str(path)
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except OSError as error:
        raise WorkloadError(f"{origin}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise WorkloadError(f"{origin}: not UTF-8 text") from None
    except yaml.YAMLError as error:
        raise WorkloadError(problems.yaml_problem(error, origin)) from None
    if not isinstance(data, dict) or not data:
        raise WorkloadError(f"{origin}: expected a mapping of names to systems")
    lines: dict[str, int] = {}
    problems.index(node, "", lines, origin)
    return {str(name): _convert(str(name), entry, lines, origin) for name, entry in data.items()}


def _convert(name: str, entry: object, lines: dict[str, int], origin: str) -> System:
    place = problems.place(origin, lines, name)
    if not _NAME.fullmatch(name):
        raise WorkloadError(f"{place}: {name}: a system's name is of letters, digits and . _ -")
    try:
        system = msgspec.convert(entry, System)
    except msgspec.ValidationError as error:
        own = {
            key.removeprefix(f"{name}."): line
            for key, line in lines.items()
            if key.startswith(f"{name}.")
        }
        kinds = {"": System, "openai": OpenAIOptions}
        text = problems.validation_problem(error, entry, own, place, kinds)
        raise WorkloadError(text) from None
    _check(f"{place}: {name}", system)
    return system


def _check(where: str, system: System) -> None:
    """Checks what the types cannot say."""
    if not system.command:
        if not system.server:
            raise LoadgenError(f"{where}: expected command or server")
        if "{port}" in system.server:
            raise LoadgenError(f"{where}: {{port}} is for a system with a command")
        return
    if "{port}" not in system.command and not system.server:
        raise LoadgenError(f"{where}: expected {{port}} in the command, or server")
    try:
        words = shlex.split(system.command)
    except ValueError as error:
        raise LoadgenError(f"{where}: command: {error}") from None
    if not words:
        raise LoadgenError(f"{where}: command: expected a program")


def server_of(system: System, port: int) -> str:
    """Returns where a system is reached, if its free port is `port`."""
    return (system.server or DEFAULT_SERVERS[system.target]).replace("{port}", str(port))


def command_of(system: System, port: int) -> list[str]:
    """Returns the words that start a system.

    Raises:
        LoadgenError: The command names a variable that the environment does not have.
    """
    words = []
    for word in shlex.split(system.command):
        try:
            filled = string.Template(word).substitute(os.environ)
        except KeyError as error:
            raise LoadgenError(
                f"the environment has no variable {error.args[0]}: {system.command}"
            ) from None
        except ValueError:
            raise LoadgenError(f"not a variable after $ (write $$ for $): {word}") from None
        words.append(filled.replace("{port}", str(port)).replace("{python}", sys.executable))
    return words
