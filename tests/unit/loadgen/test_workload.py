import statistics

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadgen import shapes, stories
from loadgen.config import Prompts, Workload
from loadgen.shapes import arrivals, think_times
from loadgen.workload import (
    AgentPlan,
    ChatPrompt,
    Step,
    TokenPrompt,
    plan,
)
from loadgen.workload import plan_agent as plan_of

BASE = Workload(total_agents=10, arrival_rate=0.5, think_time_min=2.0, think_time_max=5.0)


def ids_of(step: Step) -> list[int]:
    assert isinstance(step.prompt, TokenPrompt)
    return step.prompt.ids


def plan_agent(workload: Workload, index: int, arrival_s: float, vocab_size: int) -> AgentPlan:
    return plan_of(workload, shapes.agent(workload, index, arrival_s), vocab_size)


def thinking(agent: AgentPlan) -> list[float]:
    return [step.tool.duration_s for step in agent.steps if step.tool is not None]


def with_(**changes) -> Workload:
    return msgspec.structs.replace(BASE, **changes)


def test_a_seed_always_gives_the_same_run():
    # Figures of one seed: whoever changes these makes old runs incomparable with new ones.
    assert arrivals(BASE)[:2] == pytest.approx([0.980768, 3.763929], abs=1e-6)
    assert think_times(BASE, 0) == pytest.approx([2.076850], abs=1e-6)
    assert ids_of(plan_agent(BASE, 0, 1.0, 32000).steps[0])[:4] == [25525, 25641, 8835, 5062]


def test_another_seed_gives_another_run():
    assert arrivals(with_(seed=1)) != arrivals(BASE)
    assert think_times(with_(seed=1), 0) != think_times(BASE, 0)
    assert plan(with_(seed=1), 100)[0].steps[0].prompt != plan(BASE, 100)[0].steps[0].prompt


def test_arrivals_are_a_poisson_process():
    times = arrivals(with_(total_agents=20_000))
    gaps = [later - earlier for earlier, later in zip([0.0, *times], times, strict=False)]
    assert min(gaps) > 0
    # Gaps of an exponential distribution: mean 1 / rate, and as large a deviation.
    assert statistics.fmean(gaps) == pytest.approx(2.0, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(2.0, rel=0.05)


def test_think_times_are_uniform_between_the_bounds():
    times = [t for index in range(2_000) for t in think_times(with_(iterations=3), index)]
    assert 2.0 <= min(times) < 2.05
    assert 4.95 < max(times) <= 5.0
    assert statistics.fmean(times) == pytest.approx(3.5, rel=0.02)


def test_an_agent_reasons_once_and_then_acts_and_reflects():
    agent = plan_agent(with_(iterations=3, new_tokens=7), 4, 9.0, 100)
    assert [step.tool is None for step in agent.steps] == [True, False, False, False]
    assert [len(ids_of(step)) for step in agent.steps] == [1024, 32, 32, 32]
    assert {step.new_tokens for step in agent.steps} == {7}
    assert thinking(agent) == think_times(with_(iterations=3), 4)
    assert agent.arrival_s == 9.0


def test_without_iterations_there_is_reason_alone():
    assert len(plan_agent(with_(iterations=0), 0, 0.0, 100).steps) == 1


def test_an_agent_does_not_depend_on_how_many_others_there_are():
    few, many = plan(with_(total_agents=3), 100), plan(with_(total_agents=30), 100)
    assert many[:3] == few


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 6))
def test_processes_share_the_agents(agents, shares):
    workload = with_(total_agents=agents, context_length=4)
    dealt = [agent for share in range(shares) for agent in plan(workload, 10, share, shares)]
    assert sorted(dealt, key=lambda agent: agent.index) == list(plan(workload, 10))


@settings(deadline=None)
@given(st.integers(1, 50), st.data())
def test_the_shared_prefix_is_shared_and_the_rest_is_not(length, data):
    prefix = data.draw(st.integers(0, length))
    workload = with_(context_length=length, shared_prefix_tokens=prefix, total_agents=2)
    one, other = (ids_of(agent.steps[0]) for agent in plan(workload, 1_000_000))
    assert len(one) == len(other) == length
    assert one[:prefix] == other[:prefix]
    assert prefix == length or one[prefix:] != other[prefix:]


def test_prompts_stay_within_the_vocabulary():
    ids = ids_of(plan_agent(with_(context_length=5_000), 0, 0.0, 3).steps[0])
    assert set(ids) == {0, 1, 2}


def test_stories_are_conversations_with_the_same_think_times():
    workload = with_(prompts=Prompts.STORIES, iterations=2)
    agent = plan_agent(workload, 1, 0.0, 100)
    assert all(isinstance(step.prompt, ChatPrompt) for step in agent.steps)
    assert thinking(agent) == think_times(workload, 1)
    tokens = plan_agent(with_(iterations=2), 1, 0.0, 100)
    assert isinstance(tokens.steps[0].prompt, TokenPrompt)


@pytest.mark.parametrize("story", stories.STORIES, ids=lambda story: story.fact)
def test_what_a_story_asks_for_was_said_before_the_sleep_only(story):
    assert story.fact in " ".join(turn.content for turn in story.opening)
    after = " ".join(turn.content for act in story.acts for turn in act.turns)
    assert story.fact not in after
