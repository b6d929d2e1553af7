"""What each agent of a workload does, and when: a pure function of configuration and seed.

Agents take their numbers from random streams of their own, so an agent's plan depends on the seed
and its index only: not on how many others there are, nor on the process that runs it. The streams
are Python's own, whose results for one seed are the same on every machine.
"""

from __future__ import annotations

import random

import msgspec

from loadgen import stories
from loadgen.config import Prompts, Workload
from loadgen.stories import Turn


class TokenPrompt(msgspec.Struct, frozen=True, tag="tokens"):
    """Token ids to append as they are; generation then ignores end-of-sequence."""

    ids: list[int]


class ChatPrompt(msgspec.Struct, frozen=True, tag="chat"):
    """Turns of a conversation to append."""

    turns: tuple[Turn, ...]


Prompt = TokenPrompt | ChatPrompt


class ToolCall(msgspec.Struct, frozen=True):
    """One tool call.

    Attributes:
        name: The tool, as told to the server.
        duration_s: How long it takes; never told to the server unless the run is an oracle's.
    """

    name: str
    duration_s: float


class Step(msgspec.Struct, frozen=True):
    """One request, and the tool call that it waits for.

    Attributes:
        prompt: What is appended to the context.
        new_tokens: Most tokens to generate.
        tool: The tool call whose result the prompt is; None: the agent's first request.
    """

    prompt: Prompt
    new_tokens: int
    tool: ToolCall | None = None


class AgentPlan(msgspec.Struct, frozen=True):
    """One agent's life.

    Attributes:
        index: 0 for the first to arrive.
        name: What its session is called.
        arrival_s: When it arrives, in seconds since the run's start.
        steps: Its requests in order; the first is Reason, each other one Act and Reflect.
        tenant: Whose agent it is; empty: the run's.
    """

    index: int
    name: str
    arrival_s: float
    steps: tuple[Step, ...]
    tenant: str = ""


def _stream(workload: Workload, *what: object) -> random.Random:
    return random.Random(":".join(str(part) for part in (workload.seed, *what)))


def arrivals(workload: Workload) -> list[float]:
    """Returns each agent's arrival in seconds since the run's start: a Poisson process."""
    stream = _stream(workload, "arrivals")
    now = 0.0
    times = []
    for _ in range(workload.total_agents):
        now += stream.expovariate(workload.arrival_rate)
        times.append(now)
    return times


def think_times(workload: Workload, index: int) -> list[float]:
    """Returns the durations in seconds of one agent's tool calls, in order."""
    stream = _stream(workload, "think", index)
    return [
        stream.uniform(workload.think_time_min, workload.think_time_max)
        for _ in range(workload.iterations)
    ]


def _token_prompts(workload: Workload, index: int, vocab_size: int) -> list[Prompt]:
    ids = range(vocab_size)
    prefix = _stream(workload, "prefix").choices(ids, k=workload.shared_prefix_tokens)
    stream = _stream(workload, "prompt", index)
    own = workload.context_length - workload.shared_prefix_tokens
    first: Prompt = TokenPrompt(prefix + stream.choices(ids, k=own))
    results = [
        TokenPrompt(stream.choices(ids, k=workload.tool_tokens)) for _ in range(workload.iterations)
    ]
    return [first, *results]


def _story_prompts(workload: Workload, index: int) -> tuple[list[Prompt], list[str]]:
    story = stories.STORIES[index % len(stories.STORIES)]
    acts = [story.acts[i % len(story.acts)] for i in range(workload.iterations)]
    prompts: list[Prompt] = [ChatPrompt(story.opening)]
    prompts += [ChatPrompt(act.turns) for act in acts]
    return prompts, [act.tool for act in acts]


def plan_agent(workload: Workload, index: int, arrival_s: float, vocab_size: int) -> AgentPlan:
    """Returns what one agent does.

    Args:
        workload: The workload.
        index: The agent's number, from 0.
        arrival_s: Its entry of `arrivals`.
        vocab_size: Number of token ids of the model, for random prompts.
    """
    if workload.prompts is Prompts.STORIES:
        prompts, tools = _story_prompts(workload, index)
    else:
        prompts = _token_prompts(workload, index, vocab_size)
        tools = [workload.tool_name] * workload.iterations
    calls: list[ToolCall | None] = [None]
    calls += [
        ToolCall(tool, think)
        for tool, think in zip(tools, think_times(workload, index), strict=True)
    ]
    steps = tuple(
        Step(prompt, workload.new_tokens, call) for prompt, call in zip(prompts, calls, strict=True)
    )
    return AgentPlan(index, f"agent-{index:04d}", arrival_s, steps)


def plan(
    workload: Workload, vocab_size: int, share: int = 0, shares: int = 1
) -> tuple[AgentPlan, ...]:
    """Returns the agents of one client process, in order of arrival.

    Args:
        workload: The workload.
        vocab_size: Number of token ids of the model.
        share: Which process this is, from 0.
        shares: How many processes there are; agents are dealt to them in turn.
    """
    return tuple(
        plan_agent(workload, index, arrival_s, vocab_size)
        for index, arrival_s in enumerate(arrivals(workload))
        if index % shares == share
    )
