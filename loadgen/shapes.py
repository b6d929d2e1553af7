"""How long agents' requests and tool calls are, and when agents come: a workload without its words.

Agents take their numbers from random streams of their own, so an agent's shape depends on the seed
and its index only: not on how many others there are, nor on the process that runs it. The streams
are Python's own, whose results for one seed are the same on every machine.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import msgspec

from loadgen.config import Tool, Workload


class ToolCall(msgspec.Struct, frozen=True):
    """One tool call.

    Attributes:
        name: The tool, as told to the server.
        duration_s: How long it takes; never told to the server unless the run is an oracle's.
        period_s: The call ends at the next multiple of this on the run's clock, so that all end
            together; 0: when its duration is over.
    """

    name: str
    duration_s: float
    period_s: float = 0.0

    def due_s(self, start_s: float) -> float:
        """Returns when a call that begins at `start_s` ends, both on the run's clock."""
        end_s = start_s + self.duration_s
        return math.ceil(end_s / self.period_s) * self.period_s if self.period_s else end_s


class StepShape(msgspec.Struct, frozen=True):
    """One request.

    Attributes:
        input_tokens: Tokens appended to the context.
        output_tokens: Tokens to generate.
        tool: The tool call that comes before it; None: the agent's first request.
    """

    input_tokens: int
    output_tokens: int
    tool: ToolCall | None = None


class AgentShape(msgspec.Struct, frozen=True):
    """One agent.

    Attributes:
        index: 0 for the first to arrive.
        name: What its session is called.
        arrival_s: When it arrives, in seconds since the run's start.
        steps: Its requests in order.
        tenant: Whose agent it is; empty: the run's.
        shared_prefix_tokens: Tokens at the start of its first prompt that it shares with others.
        abandons: After its last request it begins a tool call and is never heard of again.
    """

    index: int
    name: str
    arrival_s: float
    steps: tuple[StepShape, ...]
    tenant: str = ""
    shared_prefix_tokens: int = 0
    abandons: bool = False

    @property
    def context_tokens(self) -> int:
        """Tokens of its context in the end."""
        return sum(step.input_tokens + step.output_tokens for step in self.steps)


def stream(workload: Workload, *what: object) -> random.Random:
    """Returns the random numbers of one purpose."""
    return random.Random(":".join(str(part) for part in (workload.seed, *what)))


def arrivals(workload: Workload) -> list[float]:
    """Returns each agent's arrival in seconds since the run's start: a Poisson process."""
    numbers = stream(workload, "arrivals")
    now = 0.0
    times = []
    for _ in range(workload.total_agents):
        now += numbers.expovariate(workload.arrival_rate)
        times.append(now)
    return times


def think_times(workload: Workload, index: int, calls: int | None = None) -> list[float]:
    """Returns the uniform durations in seconds of one agent's tool calls, in order."""
    numbers = stream(workload, "think", index)
    return [
        numbers.uniform(workload.think_time_min, workload.think_time_max)
        for _ in range(workload.iterations if calls is None else calls)
    ]


def tool_calls(workload: Workload, index: int, calls: int) -> list[ToolCall]:
    """Returns one agent's first `calls` tool calls."""
    period_s = workload.tool_period_s
    if not workload.tools:
        times = think_times(workload, index, calls)
        return [ToolCall(workload.tool_name, time_s, period_s) for time_s in times]
    numbers = stream(workload, "tools", index)
    weights = [tool.weight for tool in workload.tools]
    chosen = numbers.choices(workload.tools, weights, k=calls)
    return [ToolCall(tool.name, _duration_s(tool, numbers), period_s) for tool in chosen]


def _duration_s(tool: Tool, numbers: random.Random) -> float:
    low, high = tool.min_s, math.inf if tool.max_s is None else tool.max_s
    if tool.median_s is None:
        return numbers.uniform(low, high)
    return min(high, max(low, numbers.lognormvariate(math.log(tool.median_s), tool.sigma)))


def agent(workload: Workload, index: int, arrival_s: float) -> AgentShape:
    """Returns one agent's shape.

    Args:
        workload: Not a replay.
        index: The agent's number, from 0.
        arrival_s: Its entry of `arrivals`.
    """
    numbers = stream(workload, "lengths", index)
    iterations = _drawn(numbers, workload.iterations, workload.iterations_max)
    context = _drawn(numbers, workload.context_length, workload.context_length_max)
    steps = [StepShape(context, _drawn(numbers, workload.new_tokens, workload.new_tokens_max))]
    total = context + steps[0].output_tokens
    for call in tool_calls(workload, index, iterations):
        step = StepShape(
            _drawn(numbers, workload.tool_tokens, workload.tool_tokens_max),
            _drawn(numbers, workload.new_tokens, workload.new_tokens_max),
            call,
        )
        total += step.input_tokens + step.output_tokens
        if workload.context_limit is not None and total > workload.context_limit:
            break
        steps.append(step)
    fate = stream(workload, "fate", index)
    abandons = fate.random() < workload.abandon_share
    if abandons and len(steps) > 1:
        # It is lost in one of its tool calls: all that would come after it is not done.
        del steps[fate.randrange(1, len(steps)) :]
    tenant = ""
    if workload.tenants:
        weights = [choice.weight for choice in workload.tenants]
        tenant = stream(workload, "tenant", index).choices(workload.tenants, weights)[0].name
    return AgentShape(
        index=index,
        name=f"agent-{index:04d}",
        arrival_s=arrival_s,
        steps=tuple(steps),
        tenant=tenant,
        shared_prefix_tokens=workload.shared_prefix_tokens,
        abandons=abandons,
    )


def _drawn(numbers: random.Random, low: int, high: int | None) -> int:
    """Returns `low`, or a whole number from `low` to `high`, each as likely."""
    return low if high is None else numbers.randint(low, high)


def agents(workload: Workload) -> Iterator[AgentShape]:
    """Yields the agents of a workload that is not a replay, in order of arrival."""
    for index, arrival_s in enumerate(arrivals(workload)):
        yield agent(workload, index, arrival_s)


def most_tokens(workload: Workload) -> int:
    """Returns how large the context of an agent of a workload that is not a replay can grow."""
    iterations = workload.iterations_max or workload.iterations
    new_tokens = workload.new_tokens_max or workload.new_tokens
    total = (
        (workload.context_length_max or workload.context_length)
        + iterations * (workload.tool_tokens_max or workload.tool_tokens)
        + (iterations + 1) * new_tokens
    )
    return total if workload.context_limit is None else min(total, workload.context_limit)
