"""A workload file as frozen data; errors name line, key, value and what is allowed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import msgspec
import yaml

from loadgen import config_problems as problems
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


class Tool(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One kind of tool call.

    With `median_s`, durations are log-normal: half of them are longer than the median, and a few,
    the more so the larger `sigma` is, very much longer. Without it they are uniform from `min_s` to
    `max_s`.

    Attributes:
        name: As told to the server.
        weight: How frequent it is among the tools.
        median_s: Median of the duration in seconds.
        sigma: Standard deviation of the duration's natural logarithm.
        min_s: Shortest duration in seconds.
        max_s: Longest duration in seconds; with `median_s`, None is no limit.
    """

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
    weight: PositiveFloat = 1.0
    median_s: PositiveFloat | None = None
    sigma: Seconds = 1.0
    min_s: Seconds = 0.0
    max_s: Seconds | None = None


class Tenant(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One of several tenants.

    Attributes:
        name: As told to the server.
        weight: How many of the agents are its, relative to the others.
    """

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
    weight: PositiveFloat = 1.0


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

    A file must have `total_agents`, `arrival_rate` and, unless it has `tools`, the two think times;
    or else `replay`. Where a number has a counterpart that ends in ``_max``, each agent, or each
    request, draws its own, every one between the two as likely.

    Attributes:
        total_agents: Agents in the run; of a replay, those of its trace.
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
        iterations_max: Most tool calls of an agent; None: `iterations`.
        context_length_max: Most tokens of the first prompt; None: `context_length`.
        tool_tokens_max: Most tokens of a tool's result; None: `tool_tokens`.
        new_tokens_max: Most tokens generated per request; None: `new_tokens`.
        context_limit: An agent ends before a request that would take its context beyond this.
        tool_name: The tool's name as told to the server.
        tools: The tools, in place of `tool_name` and the think times.
        tool_period_s: Tool calls end together: each at the next multiple of this after the run's
            start; 0: each when its duration is over.
        tenants: Whose the agents are; empty: `tenant`'s.
        abandon_share: Share of the agents, 0 to 1, of which one tool call never returns: they say
            nothing more and never close their session.
        replay: A trace to do instead; see `loadgen.replay`. All of the above, but for `mode`, then
            comes from there.
        oracle: Tell the server how long each tool call will take. No real client knows it, so the
            run is labelled.
        request_timeout_s: A request that takes longer has failed.
        tenant: Whose agents they are; empty: a tenant of the run's own, which finds no prefix of an
            earlier run.
    """

    total_agents: PositiveCount = 1
    arrival_rate: PositiveFloat = 1.0
    think_time_min: Seconds = 0.0
    think_time_max: Seconds = 0.0
    new_tokens: PositiveCount = 50
    iterations: Count = 1
    context_length: PositiveCount = 1024
    tool_tokens: PositiveCount = 32
    shared_prefix_tokens: Count = 0
    seed: Count = 0
    mode: Mode = Mode.OPEN
    prompts: Prompts = Prompts.TOKENS
    iterations_max: Count | None = None
    context_length_max: PositiveCount | None = None
    tool_tokens_max: PositiveCount | None = None
    new_tokens_max: PositiveCount | None = None
    context_limit: PositiveCount | None = None
    tool_name: str = "tool"
    tools: tuple[Tool, ...] = ()
    tool_period_s: Seconds = 0.0
    tenants: tuple[Tenant, ...] = ()
    abandon_share: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 0.0
    replay: str = ""
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
    if config.workload.replay:
        # A trace's agents have workloads' types.
        from loadgen import replay

        trace = path.parent / config.workload.replay
        workload = msgspec.structs.replace(
            config.workload, replay=str(trace), total_agents=len(replay.read(trace))
        )
        config = msgspec.structs.replace(config, workload=workload)
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
        raise WorkloadError(problems.yaml_problem(error, origin)) from None
    except (ValueError, RecursionError) as error:
        # Such as a date with a 13th month, or brackets without end.
        problem = str(error).splitlines()[0]
        raise WorkloadError(f"{origin}: not valid YAML: {problem}") from None
    if not isinstance(data, dict):
        what = "nothing" if data is None else problems.describe(data)
        raise WorkloadError(
            f"{origin}: expected a mapping with the key 'workload', got {what}",
        )
    lines: dict[str, int] = {}
    problems.index(node, "", lines, origin)
    for key, value in (overrides or {}).items():
        _override(data, key, value)
        lines.pop(key, None)
    try:
        config = msgspec.convert(data, RunConfig)
    except msgspec.ValidationError as error:
        text = problems.validation_problem(error, data, lines, origin, _KINDS)
        raise WorkloadError(text) from None
    _check_given(data["workload"], lines, origin)
    _check(config, lines, origin)
    return config


_KINDS: dict[str, type] = {
    "": RunConfig,
    "experiment": Experiment,
    "workload": Workload,
    "workload.mode": Mode,
    "workload.prompts": Prompts,
    "workload.tenants": Tenant,
    "workload.tools": Tool,
}


def _check_given(given: dict[str, object], lines: dict[str, int], origin: str) -> None:
    """Checks that a workload says what has no default."""
    if given.get("replay"):
        return
    needed = ["total_agents", "arrival_rate"]
    if not given.get("tools"):
        needed += ["think_time_min", "think_time_max"]
    for name in needed:
        if name not in given:
            place = problems.place(origin, lines, "workload")
            raise WorkloadError(f"{place}: workload.{name}: missing")


_FINITE = (
    "arrival_rate",
    "think_time_min",
    "think_time_max",
    "request_timeout_s",
    "tool_period_s",
)


def _check(config: RunConfig, lines: dict[str, int], origin: str) -> None:
    """Checks what the types cannot say."""
    load = config.workload

    def refuse(key: str, problem: str) -> None:
        raise WorkloadError(f"{problems.place(origin, lines, key)}: {key}: {problem}")

    for name in _FINITE:
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
    for name in ("iterations", "context_length", "tool_tokens", "new_tokens"):
        low, high = getattr(load, name), getattr(load, f"{name}_max")
        if high is not None and high < low:
            refuse(f"workload.{name}_max", f"expected at least {name} ({low}), got {high}")
    if load.context_limit is not None:
        first = (load.context_length_max or load.context_length) + (
            load.new_tokens_max or load.new_tokens
        )
        if load.context_limit < first:
            refuse(
                "workload.context_limit",
                f"expected at least {first}, got {load.context_limit}",
            )
    _check_tools(load, refuse)
    if not re.fullmatch(r"[A-Za-z0-9._ -]{0,100}", config.experiment.name):
        refuse(
            "experiment.name",
            "expected at most 100 letters, digits, blanks and any of . _ -, "
            f"got {config.experiment.name!r}",
        )
    for name, value in config.expected_results.items():
        key = f"expected_results.{name}"
        if not expectations.known(name):
            refuse(key, f"unknown result{problems.hint(name, expectations.names())}")
        if not math.isfinite(value):
            refuse(key, f"expected a finite number, got {value}")


def _check_tools(load: Workload, refuse: Callable[[str, str], None]) -> None:
    for number, tool in enumerate(load.tools):
        key = f"workload.tools[{number}]"
        if tool.max_s is None and tool.median_s is None:
            refuse(key, "expected median_s or max_s")
        if tool.max_s is not None and not tool.min_s <= tool.max_s < math.inf:
            refuse(
                f"{key}.max_s", f"expected at least min_s ({tool.min_s}), finite, got {tool.max_s}"
            )
        for name in ("weight", "median_s", "sigma", "min_s"):
            value = getattr(tool, name)
            if value is not None and not math.isfinite(value):
                refuse(f"{key}.{name}", f"expected a finite number, got {value}")
    for number, tenant in enumerate(load.tenants):
        if not math.isfinite(tenant.weight):
            key = f"workload.tenants[{number}].weight"
            refuse(key, f"expected a finite number, got {tenant.weight}")


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
