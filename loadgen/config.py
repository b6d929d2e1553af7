"""A workload file as frozen data; errors name line, key, value and what is allowed."""

from __future__ import annotations

import difflib
import math
import re
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import msgspec
import yaml

from loadgen import expectations
from loadgen.errors import WorkloadError

Count = Annotated[int, msgspec.Meta(ge=0)]
PositiveCount = Annotated[int, msgspec.Meta(ge=1)]
Seconds = Annotated[float, msgspec.Meta(ge=0.0)]
PositiveFloat = Annotated[float, msgspec.Meta(gt=0.0)]


class Mode(Enum):
    """Whether an agent leaves when it has finished.

    ``open``: it closes its session at once. ``live``: it keeps it until the last agent is done, so
    that the whole population's KV must be kept.
    """

    OPEN = "open"
    LIVE = "live"


class Prompts(Enum):
    """What agents say: random token ids of the lengths given, or scripted conversations."""

    TOKENS = "tokens"
    STORIES = "stories"


class Experiment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a run is called.

    Attributes:
        name: Part of the run's folder name; empty: the workload file's name.
        description: One line for the report.
    """

    name: str = ""
    description: str = ""


class Workload(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Who arrives when, and what each agent does.

    Attributes:
        total_agents: Agents in the run.
        arrival_rate: Mean arrivals per second of the Poisson process.
        think_time_min: Shortest tool call in seconds.
        think_time_max: Longest tool call in seconds; durations are uniform between the two.
        new_tokens: Tokens generated per request; with `prompts: stories` at most so many.
        iterations: Tool calls of each agent, each followed by a Reflect request.
        context_length: Tokens of the first prompt, the shared prefix included.
        tool_tokens: Tokens of each tool's result, which begin the Reflect request.
        shared_prefix_tokens: Tokens at the start of the first prompt that all agents share.
        seed: Decides arrivals, think times and prompts.
        mode: See `Mode`.
        prompts: See `Prompts`.
        tool_name: The tool's name as told to the server.
        oracle: Tell the server how long each tool call will take. No real client knows it, so the
            run is labelled.
        request_timeout_s: A request that takes longer has failed.
        tenant: Whose agents they are; empty: a tenant of the run's own, which finds no prefix of an
            earlier run.
    """

    total_agents: PositiveCount
    arrival_rate: PositiveFloat
    think_time_min: Seconds
    think_time_max: Seconds
    new_tokens: PositiveCount = 50
    iterations: Count = 1
    context_length: PositiveCount = 1024
    tool_tokens: PositiveCount = 32
    shared_prefix_tokens: Count = 0
    seed: Count = 0
    mode: Mode = Mode.OPEN
    prompts: Prompts = Prompts.TOKENS
    tool_name: str = "tool"
    oracle: bool = False
    request_timeout_s: PositiveFloat = 600.0
    tenant: Annotated[str, msgspec.Meta(max_length=128)] = ""


class RunConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One workload file.

    Attributes:
        workload: Who arrives when, and what each agent does.
        experiment: What the run is called.
        expected_results: Bounds that the report checks, by the names of `expectations.BOUNDS`.
    """

    workload: Workload
    experiment: Experiment = Experiment()
    expected_results: dict[str, float] = {}


def load(path: Path, overrides: dict[str, str] | None = None) -> RunConfig:
    """Reads a workload file.

    Args:
        path: The file.
        overrides: Values by dotted key, such as ``{"workload.seed": "3"}``, in place of the file's.

    Returns:
        The configuration, with defaults for what the file leaves out.

    Raises:
        WorkloadError: The file cannot be read, or is not a valid workload.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise WorkloadError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise WorkloadError(f"{path}: not UTF-8 text") from None
    config = parse(text, str(path), overrides)
    if config.experiment.name:
        return config
    named = msgspec.structs.replace(config.experiment, name=path.stem)
    return msgspec.structs.replace(config, experiment=named)


def parse(text: str, origin: str, overrides: dict[str, str] | None = None) -> RunConfig:
    """Reads a workload from text; see `load`. `origin` stands for the file in errors."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise WorkloadError(_yaml_problem(error, origin)) from None
    except (ValueError, RecursionError) as error:
        # Such as a date with a 13th month, or brackets without end.
        problem = str(error).splitlines()[0]
        raise WorkloadError(f"{origin}: not valid YAML: {problem}") from None
    if not isinstance(data, dict):
        what = "nothing" if data is None else _describe(data)
        raise WorkloadError(
            f"{origin}: expected a mapping with the key 'workload', got {what}",
        )
    lines: dict[str, int] = {}
    _index(node, "", lines, origin)
    for key, value in (overrides or {}).items():
        _override(data, key, value)
        lines.pop(key, None)
    try:
        config = msgspec.convert(data, RunConfig)
    except msgspec.ValidationError as error:
        raise WorkloadError(_validation_problem(error, data, lines, origin)) from None
    _check(config, lines, origin)
    return config


def _check(config: RunConfig, lines: dict[str, int], origin: str) -> None:
    """Checks what the types cannot say."""
    load = config.workload

    def refuse(key: str, problem: str) -> None:
        raise WorkloadError(f"{_place(origin, lines, key)}: {key}: {problem}")

    for name in ("arrival_rate", "think_time_min", "think_time_max", "request_timeout_s"):
        if not math.isfinite(getattr(load, name)):
            refuse(f"workload.{name}", f"expected a finite number, got {getattr(load, name)}")
    if load.think_time_max < load.think_time_min:
        refuse(
            "workload.think_time_max",
            f"expected at least think_time_min ({load.think_time_min}), got {load.think_time_max}",
        )
    if load.shared_prefix_tokens > load.context_length:
        refuse(
            "workload.shared_prefix_tokens",
            f"expected at most context_length ({load.context_length}), "
            f"got {load.shared_prefix_tokens}",
        )
    if not re.fullmatch(r"[A-Za-z0-9._ -]{0,100}", config.experiment.name):
        refuse(
            "experiment.name",
            "expected at most 100 letters, digits, blanks and any of . _ -, "
            f"got {config.experiment.name!r}",
        )
    for name, value in config.expected_results.items():
        key = f"expected_results.{name}"
        if not expectations.known(name):
            refuse(key, f"unknown result{_hint(name, expectations.names())}")
        if not math.isfinite(value):
            refuse(key, f"expected a finite number, got {value}")


def _yaml_problem(error: yaml.YAMLError, origin: str) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    place = f"{origin}:{mark.line + 1}" if mark is not None else origin
    return f"{place}: not valid YAML: {problem}"


def _index(node: yaml.Node | None, prefix: str, lines: dict[str, int], origin: str) -> None:
    """Collects each key's line number, and refuses keys given twice, which YAML would merge."""
    if not isinstance(node, yaml.MappingNode) or prefix.count(".") > _MAX_DEPTH:
        return
    for key_node, value_node in node.value:
        key = f"{prefix}{key_node.value}"
        line = key_node.start_mark.line + 1
        if key in lines:
            raise WorkloadError(f"{origin}:{line}: {key}: given twice, first in line {lines[key]}")
        lines[key] = line
        _index(value_node, f"{key}.", lines, origin)


def _override(data: dict[str, Any], key: str, value: str) -> None:
    *parents, last = key.split(".")
    where = data
    for parent in parents:
        child = where.setdefault(parent, {})
        if not isinstance(child, dict):
            raise WorkloadError(f"--set {key}: {parent} is not a mapping")
        where = child
    try:
        where[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise WorkloadError(f"--set {key}: not a valid value: {value!r}") from None


_MAX_DEPTH = 8

_AT = re.compile(r"^(?P<problem>.*?)(?: - at `(?P<key>key` in `)?\$?(?P<path>.*?)`)?$", re.DOTALL)
_TYPE = re.compile(r"Expected `(?P<type>[^`]+)`(?P<bound> (?:>=|<=|>|<) \S+)?(?:, got `.*`)?")
_TYPE_NAMES = {
    "bool": "true or false",
    "float": "a number",
    "int": "a whole number",
    "object": "a mapping",
    "str": "text",
}


def _validation_problem(
    error: msgspec.ValidationError, data: object, lines: dict[str, int], origin: str
) -> str:
    """Returns msgspec's error as ``file:line: key: what was expected and what was there``."""
    match = _AT.match(str(error))
    problem = match["problem"] if match else str(error)
    path = ((match["path"] if match else "") or "").lstrip(".")
    path = re.sub(r"\[(?:\.\.\.)?\]", "", path)
    if match and match["key"]:
        return f"{_place(origin, lines, path)}: {path or 'the file'}: a key is not text"
    if unknown := re.fullmatch(r"Object contains unknown field `(.*)`", problem):
        key = f"{path}.{unknown[1]}".lstrip(".")
        hint = _hint(unknown[1], _fields(path))
        return f"{_place(origin, lines, key)}: {key}: unknown key{hint}"
    if missing := re.fullmatch(r"Object missing required field `(.*)`", problem):
        key = f"{path}.{missing[1]}".lstrip(".")
        return f"{_place(origin, lines, path)}: {key}: missing"
    key, value = _wrong_value(path, data)
    if kind := {"workload.mode": Mode, "workload.prompts": Prompts}.get(path):
        allowed = " or ".join(str(member.value) for member in kind)
        return f"{_place(origin, lines, key)}: {key}: expected {allowed}, got {_describe(value)}"
    expected = problem
    if typed := _TYPE.match(problem):
        bounds = {">=": "at least", "<=": "at most", ">": "above", "<": "below"}
        expected = "expected " + " or ".join(
            _TYPE_NAMES.get(name, name) for name in typed["type"].split(" | ")
        )
        if typed["bound"]:
            sign, limit = typed["bound"].split()
            expected += f", {bounds[sign]} {limit.rstrip('`')}"
    return f"{_place(origin, lines, key)}: {key}: {expected}, got {_describe(value)}"


def _wrong_value(path: str, data: object) -> tuple[str, object]:
    value = data
    for part in filter(None, path.split(".")):
        if isinstance(value, dict) and part in value:
            value = value[part]
    if path == "expected_results" and isinstance(value, dict):
        # The path ends at a mapping of free keys: the wrong one is not named.
        for name, entry in value.items():
            if isinstance(entry, bool) or not isinstance(entry, int | float):
                return f"{path}.{name}", entry
    return path or "the file", value


def _fields(path: str) -> tuple[str, ...]:
    kinds = {"": RunConfig, "workload": Workload, "experiment": Experiment}
    kind = kinds.get(path)
    return kind.__struct_fields__ if kind else ()


def _hint(name: str, allowed: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(name, allowed, n=1)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; known are {', '.join(allowed)}" if allowed else ""


def _place(origin: str, lines: dict[str, int], key: str) -> str:
    while key:
        if key in lines:
            return f"{origin}:{lines[key]}"
        key = key.rpartition(".")[0]
    return origin


def _describe(value: object) -> str:
    names = {bool: "", int: "", float: "", str: "", list: "a list", dict: "a mapping"}
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return f"the text {value!r}"
    if isinstance(value, bool):
        return "true" if value else "false"
    return names.get(type(value)) or repr(value)
