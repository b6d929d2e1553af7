"""Workloads as trace files: one JSON object per line and request.

The form is Mooncake's with sessions, as AIPerf and Dynamo read it: times in milliseconds, the first
line of a session with its `timestamp`, each later one with the `delay` since the answer before it,
and `input_length` the tokens that a request adds to what its session holds already::

    {"timestamp": 980.768, "session_id": "agent-0000", "input_length": 1024, "output_length": 50}
    {"session_id": "agent-0000", "delay": 12076.85, "tool": "search", "input_length": 32, ...}

Without a `session_id` a line is a session by itself, as in Mooncake's own traces. `input_tokens`,
`output_tokens`, `created_time` and `delay_ms` are other names of the same. What only Djinn knows:

- `tool`: the name of the tool call before the request, `tool_period`: it ends at the next multiple
  of this on the run's clock,
- `tenant`: whose session it is, in its first line,
- `shared_prefix_length`: how many of its first tokens all sessions of the tenant share, likewise,
- `abandons`: after this request a tool call begins and the session is never heard of again.

`hash_ids`, which say what prompts of different sessions have in common, are read over, and so is
whatever else other tools write into a line.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import msgspec

from loadgen.errors import WorkloadError
from loadgen.shapes import AgentShape, StepShape, ToolCall

Milliseconds = Annotated[float, msgspec.Meta(ge=0)]
Tokens = Annotated[int, msgspec.Meta(ge=1)]
Prefix = Annotated[int, msgspec.Meta(ge=0)]


class Line(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line; the module says what its fields mean."""

    timestamp: Milliseconds | None = None
    session_id: str = ""
    delay: Milliseconds | None = None
    tool: str = ""
    tool_period: Milliseconds = 0.0
    input_length: Tokens
    output_length: Tokens
    tenant: str = ""
    shared_prefix_length: Prefix = 0
    abandons: bool = False


_ALIASES = {
    "input_tokens": "input_length",
    "output_tokens": "output_length",
    "created_time": "timestamp",
    "delay_ms": "delay",
}


def write(agents: Iterable[AgentShape]) -> Iterator[bytes]:
    """Yields a trace, line by line; the same for the same agents."""
    encoder = msgspec.json.Encoder()
    for agent in agents:
        last = len(agent.steps) - 1
        for number, step in enumerate(agent.steps):
            call = step.tool
            line = Line(
                timestamp=None if number else _milliseconds(agent.arrival_s),
                session_id=agent.name,
                delay=None if call is None else _milliseconds(call.duration_s),
                tool="" if call is None else call.name,
                tool_period=0.0 if call is None else _milliseconds(call.period_s),
                input_length=step.input_tokens,
                output_length=step.output_tokens,
                tenant="" if number else agent.tenant,
                shared_prefix_length=0 if number else agent.shared_prefix_tokens,
                abandons=agent.abandons and number == last,
            )
            yield encoder.encode(line) + b"\n"


def read(path: Path) -> list[AgentShape]:
    """Reads a trace.

    Returns:
        The agents in order of arrival, numbered from 0.

    Raises:
        WorkloadError: It cannot be read or has no lines, or one is broken; the message has its
            number.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise WorkloadError(f"{path}: {error.strerror}") from None
    sessions: dict[str, list[Line]] = {}
    for number, text in enumerate(data.split(b"\n"), start=1):
        if not text.strip():
            continue
        line = _line(text, f"{path}:{number}")
        name = line.session_id or f"line-{number}"
        lines = sessions.setdefault(name, [])
        problem = _problem(line, lines)
        if problem:
            raise WorkloadError(f"{path}:{number}: {problem}")
        lines.append(line)
    if not sessions:
        raise WorkloadError(f"{path}: there is no request in it")
    # Sorting is stable: of sessions that begin at one moment the file's order holds.
    ordered = sorted(sessions.items(), key=lambda session: session[1][0].timestamp or 0.0)
    return [_agent(index, name, lines) for index, (name, lines) in enumerate(ordered)]


def _line(text: bytes, place: str) -> Line:
    try:
        fields = msgspec.json.decode(text)
        if not isinstance(fields, dict):
            raise WorkloadError(f"{place}: expected an object")
        for alias, name in _ALIASES.items():
            if alias in fields:
                fields.setdefault(name, fields.pop(alias))
        return msgspec.convert(fields, Line)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise WorkloadError(f"{place}: {error}") from None


def _problem(line: Line, before: list[Line]) -> str:
    """Returns what is wrong with a line, given the session's lines before it; empty: nothing."""
    if before:
        if line.delay is None:
            return "delay: missing, and the session has an earlier line"
        if before[-1].abandons:
            return "the session was abandoned in an earlier line"
        return ""
    if line.shared_prefix_length > line.input_length:
        return f"shared_prefix_length: expected at most input_length ({line.input_length})"
    return ""


def _agent(index: int, name: str, lines: list[Line]) -> AgentShape:
    steps = [StepShape(lines[0].input_length, lines[0].output_length)]
    for line in lines[1:]:
        assert line.delay is not None
        call = ToolCall(line.tool or "tool", _seconds(line.delay), _seconds(line.tool_period))
        steps.append(StepShape(line.input_length, line.output_length, call))
    return AgentShape(
        index=index,
        name=name,
        arrival_s=_seconds(lines[0].timestamp or 0.0),
        steps=tuple(steps),
        tenant=lines[0].tenant,
        shared_prefix_tokens=lines[0].shared_prefix_length,
        abandons=lines[-1].abandons,
    )


def _milliseconds(seconds: float) -> float:
    """Returns milliseconds, to the microsecond."""
    return round(seconds * 1e3, 3)


def _seconds(milliseconds: float) -> float:
    """Returns seconds, to the microsecond."""
    return round(milliseconds / 1e3, 6)
