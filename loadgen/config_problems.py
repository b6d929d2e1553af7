"""Problems of a YAML file in one line each: where it is, what was expected and what was there."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from enum import Enum

import msgspec
import yaml

from loadgen.errors import WorkloadError

_MAX_DEPTH = 8


def yaml_problem(error: yaml.YAMLError, origin: str) -> str:
    """Returns what a YAML parser objected to."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    where = f"{origin}:{mark.line + 1}" if mark is not None else origin
    return f"{where}: not valid YAML: {problem}"


def index(node: yaml.Node | None, prefix: str, lines: dict[str, int], origin: str) -> None:
    """Collects each key's line number, and refuses keys given twice, which YAML would merge.

    Args:
        node: A mapping or a list; another has no keys.
        prefix: Of its keys, such as ``"workload."`` or ``"workload.tools[0]."``.
        lines: Where they go.
        origin: What to call the file.

    Raises:
        WorkloadError: A key is given twice.
    """
    if prefix.count(".") > _MAX_DEPTH:
        return
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            key = f"{prefix.removesuffix('.')}[{number}]"
            lines[key] = item.start_mark.line + 1
            index(item, f"{key}.", lines, origin)
    if not isinstance(node, yaml.MappingNode):
        return
    for key_node, value_node in node.value:
        key = f"{prefix}{key_node.value}"
        line = key_node.start_mark.line + 1
        if key in lines:
            raise WorkloadError(f"{origin}:{line}: {key}: given twice, first in line {lines[key]}")
        lines[key] = line
        index(value_node, f"{key}.", lines, origin)


_AT = re.compile(r"^(?P<problem>.*?)(?: - at `(?P<key>key` in `)?\$?(?P<path>.*?)`)?$", re.DOTALL)
_TYPE = re.compile(r"Expected `(?P<type>[^`]+)`(?P<bound> (?:>=|<=|>|<) \S+)?(?:, got `.*`)?")
_TYPE_NAMES = {
    "bool": "true or false",
    "float": "a number",
    "int": "a whole number",
    "object": "a mapping",
    "str": "text",
}


def validation_problem(
    error: msgspec.ValidationError,
    data: object,
    lines: dict[str, int],
    origin: str,
    kinds: Mapping[str, type],
) -> str:
    """Returns msgspec's error as ``file:line: key: what was expected and what was there``.

    Args:
        error: Of converting `data`.
        data: The file's content.
        lines: Line numbers by key, of `index`.
        origin: What to call the file.
        kinds: The type of each mapping, of each list's items, and of each choice, by its key.
    """
    match = _AT.match(str(error))
    problem = match["problem"] if match else str(error)
    path = ((match["path"] if match else "") or "").lstrip(".")
    path = re.sub(r"\[(?:\.\.\.)?\]", "", path)
    kind = kinds.get(re.sub(r"\[\d+\]", "", path))
    if match and match["key"]:
        return f"{place(origin, lines, path)}: {path or 'the file'}: a key is not text"
    key, value = _wrong_value(path, data)
    if unknown := re.fullmatch(r"Object contains unknown field `(.*)`", problem):
        whole = f"{'' if key == 'the file' else key}.{unknown[1]}".lstrip(".")
        known = getattr(kind, "__struct_fields__", ())
        return f"{place(origin, lines, whole)}: {whole}: unknown key{hint(unknown[1], known)}"
    if missing := re.fullmatch(r"Object missing required field `(.*)`", problem):
        whole = f"{'' if key == 'the file' else key}.{missing[1]}".lstrip(".")
        return f"{place(origin, lines, key)}: {whole}: missing"
    if kind is not None and issubclass(kind, Enum):
        allowed = " or ".join(str(member.value) for member in kind)
        return f"{place(origin, lines, key)}: {key}: expected {allowed}, got {describe(value)}"
    return f"{place(origin, lines, key)}: {key}: {_expected(problem)}, got {describe(value)}"


def _expected(problem: str) -> str:
    typed = _TYPE.match(problem)
    if not typed:
        return problem
    bounds = {">=": "at least", "<=": "at most", ">": "above", "<": "below"}
    expected = "expected " + " or ".join(
        _TYPE_NAMES.get(name, name) for name in typed["type"].split(" | ")
    )
    if typed["bound"]:
        sign, limit = typed["bound"].split()
        expected += f", {bounds[sign]} {limit.rstrip('`')}"
    return expected


def _wrong_value(path: str, data: object) -> tuple[str, object]:
    """Returns a wrong value, and its key as far as the file has it."""
    value = data
    found: list[str] = []
    for part in filter(None, path.split(".")):
        name, *places = re.split(r"\[(\d+)\]", part)
        if not isinstance(value, dict) or name not in value:
            break
        value = value[name]
        found.append(part)
        for number in filter(None, places):
            if isinstance(value, list):
                value = value[int(number)]
    if path == "expected_results" and isinstance(value, dict):
        # The path ends at a mapping of free keys: the wrong one is not named.
        for name, entry in value.items():
            if isinstance(entry, bool) or not isinstance(entry, int | float):
                return f"{path}.{name}", entry
    return ".".join(found) or "the file", value


def hint(name: str, allowed: tuple[str, ...]) -> str:
    """Returns what may have been meant by an unknown name."""
    close = difflib.get_close_matches(name, allowed, n=1)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; known are {', '.join(allowed)}" if allowed else ""


def place(origin: str, lines: dict[str, int], key: str) -> str:
    """Returns ``file:line`` of a key, or of the closest one around it that has a line."""
    while key:
        if key in lines:
            return f"{origin}:{lines[key]}"
        key = key.rpartition(".")[0]
    return origin


def describe(value: object) -> str:
    """Returns a value as an error shows it."""
    names = {bool: "", int: "", float: "", str: "", list: "a list", dict: "a mapping"}
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return f"the text {value!r}"
    if isinstance(value, bool):
        return "true" if value else "false"
    return names.get(type(value)) or repr(value)
