"""What the agents do, read from a trace file.

One JSON object per line and request, in the form of Mooncake's traces with sessions, times in
milliseconds::

    {"timestamp": 980.768, "session_id": "agent-0000", "input_length": 1024, "output_length": 50}
    {"session_id": "agent-0000", "delay": 12076.85, "tool": "search", "input_length": 32, ...}

The first line of a session says when it arrives, each later one how long the tool call before it
took. `input_length` counts the tokens that the request adds to the session's context.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec

from services.common.errors import ConfigError

_Milliseconds = Annotated[float, msgspec.Meta(ge=0)]
_Tokens = Annotated[int, msgspec.Meta(ge=1)]


class _Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    session_id: Annotated[str, msgspec.Meta(min_length=1)]
    input_length: _Tokens
    output_length: _Tokens
    timestamp: _Milliseconds | None = None
    delay: _Milliseconds | None = None
    tool: str = ""
    tool_period: _Milliseconds = 0.0
    tenant: str = ""
    priority: int = 0
    shared_prefix_length: Annotated[int, msgspec.Meta(ge=0)] = 0
    abandons: bool = False


class TracedStep(msgspec.Struct, frozen=True):
    """One request of an agent, and the tool call that comes before it.

    Attributes:
        input_tokens: Appended to the context.
        output_tokens: Generated.
        tool: The tool's name; empty: unnamed, or the first request.
        tool_s: How long the tool call takes; 0 with the first request.
        tool_period_s: The call ends at the next multiple of this; 0: when it is over.
    """

    input_tokens: int
    output_tokens: int
    tool: str = ""
    tool_s: float = 0.0
    tool_period_s: float = 0.0


class TracedAgent(msgspec.Struct, frozen=True):
    """One agent.

    Attributes:
        name: Its session's id.
        arrival_s: When it arrives.
        tenant: Whose it is; empty: the run's.
        priority: Of its session.
        abandons: After its last request it begins a tool call and is never heard of again.
        steps: Its requests in order.
    """

    name: str
    arrival_s: float
    tenant: str
    priority: int
    abandons: bool
    steps: list[TracedStep]


def read(path: Path) -> list[TracedAgent]:
    """Reads a trace.

    Returns:
        The agents, those that arrive first ahead.

    Raises:
        ConfigError: It cannot be read, or a line is broken; the message has the line's number.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    decoder = msgspec.json.Decoder(_Line)
    agents: dict[str, TracedAgent] = {}
    for number, text in enumerate(data.split(b"\n"), start=1):
        if not text.strip():
            continue
        try:
            line = decoder.decode(text)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}:{number}: {error}") from None
        known = agents.get(line.session_id)
        if known is not None and line.delay is None:
            raise ConfigError(f"{path}:{number}: delay: missing from a session's later line")
        if known is None:
            known = agents[line.session_id] = TracedAgent(
                name=line.session_id,
                arrival_s=(line.timestamp or 0.0) / 1e3,
                tenant=line.tenant,
                priority=line.priority,
                abandons=False,
                steps=[],
            )
        elif known.abandons:
            raise ConfigError(f"{path}:{number}: comes after a line that abandons the session")
        known.steps.append(
            TracedStep(
                line.input_length,
                line.output_length,
                line.tool,
                (line.delay or 0.0) / 1e3 if known.steps else 0.0,
                line.tool_period / 1e3,
            )
        )
        if line.abandons:
            agents[line.session_id] = msgspec.structs.replace(known, abandons=True)
    if not agents:
        raise ConfigError(f"{path}: there is no agent in it")
    # Sorting is stable: of agents that arrive at one moment the file's order holds.
    return sorted(agents.values(), key=lambda agent: agent.arrival_s)
