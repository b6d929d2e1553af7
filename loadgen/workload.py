"""What each agent of a workload says: `shapes` with words, or with random tokens.

Prompts take their tokens from random streams of their own; see `shapes`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from loadgen import replay, shapes, stories
from loadgen.config import Prompts, Workload
from loadgen.shapes import AgentShape, ToolCall
from loadgen.stories import Turn


class TokenPrompt(msgspec.Struct, frozen=True, tag="tokens"):
    """Token ids to append as they are; generation then ignores end-of-sequence."""

    ids: list[int]


class ChatPrompt(msgspec.Struct, frozen=True, tag="chat"):
    """Turns of a conversation to append."""

    turns: tuple[Turn, ...]


Prompt = TokenPrompt | ChatPrompt


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
        abandons: After its last request it begins a tool call and is never heard of again.
    """

    index: int
    name: str
    arrival_s: float
    steps: tuple[Step, ...]
    tenant: str = ""
    abandons: bool = False


def agent_shapes(workload: Workload) -> Iterator[AgentShape]:
    """Yields the workload's agents in order of arrival.

    Raises:
        WorkloadError: It is a replay, and its trace cannot be read.
    """
    if workload.replay:
        yield from replay.read(Path(workload.replay))
    else:
        yield from shapes.agents(workload)


def _token_prompts(workload: Workload, shape: AgentShape, vocab_size: int) -> list[Prompt]:
    ids = range(vocab_size)
    shared = shape.shared_prefix_tokens
    # Of one tenant, the longer of two shared prefixes begins with the shorter.
    prefix = shapes.stream(workload, "prefix").choices(ids, k=shared)
    numbers = shapes.stream(workload, "prompt", shape.index)
    own = shape.steps[0].input_tokens - shared
    first: Prompt = TokenPrompt(prefix + numbers.choices(ids, k=own))
    results = [TokenPrompt(numbers.choices(ids, k=step.input_tokens)) for step in shape.steps[1:]]
    return [first, *results]


def _story_steps(shape: AgentShape) -> tuple[Step, ...]:
    story = stories.STORIES[shape.index % len(stories.STORIES)]
    steps = [Step(ChatPrompt(story.opening), shape.steps[0].output_tokens)]
    for number, step in enumerate(shape.steps[1:]):
        assert step.tool is not None
        act = story.acts[number % len(story.acts)]
        call = msgspec.structs.replace(step.tool, name=act.tool)
        steps.append(Step(ChatPrompt(act.turns), step.output_tokens, call))
    return tuple(steps)


def plan_agent(workload: Workload, shape: AgentShape, vocab_size: int) -> AgentPlan:
    """Returns what one agent does.

    Args:
        workload: The workload.
        shape: One of its agents.
        vocab_size: Number of token ids of the model, for random prompts.
    """
    if workload.prompts is Prompts.STORIES:
        steps = _story_steps(shape)
    else:
        prompts = _token_prompts(workload, shape, vocab_size)
        steps = tuple(
            Step(prompt, step.output_tokens, step.tool)
            for prompt, step in zip(prompts, shape.steps, strict=True)
        )
    return AgentPlan(shape.index, shape.name, shape.arrival_s, steps, shape.tenant, shape.abandons)


def plan(
    workload: Workload, vocab_size: int, share: int = 0, shares: int = 1
) -> tuple[AgentPlan, ...]:
    """Returns the agents of one client process, in order of arrival.

    Args:
        workload: The workload.
        vocab_size: Number of token ids of the model.
        share: Which process this is, from 0.
        shares: How many processes there are; agents are dealt to them in turn.

    Raises:
        WorkloadError: The workload is a replay, and its trace cannot be read.
    """
    return tuple(
        plan_agent(workload, shape, vocab_size)
        for shape in agent_shapes(workload)
        if shape.index % shares == share
    )
