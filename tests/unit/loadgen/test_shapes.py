import statistics

import msgspec
import pytest

from loadgen import shapes
from loadgen.config import Tenant, Tool, Workload
from loadgen.shapes import AgentShape, ToolCall

BASE = Workload(total_agents=400, arrival_rate=10.0, think_time_min=2.0, think_time_max=5.0)


def agents(**changes) -> list[AgentShape]:
    return list(shapes.agents(msgspec.structs.replace(BASE, **changes)))


def calls(made: list[AgentShape]) -> list[ToolCall]:
    return [step.tool for agent in made for step in agent.steps if step.tool is not None]


def test_log_normal_tools_have_their_median_and_a_long_tail():
    tool = Tool(name="tests", median_s=10.0, sigma=1.0, min_s=0.5, max_s=60.0)
    times = [call.duration_s for call in calls(agents(tools=(tool,), iterations=5))]
    assert statistics.median(times) == pytest.approx(10.0, rel=0.1)
    # A log-normal of sigma 1 exceeds 5 times its median in 5.4 % of the cases.
    assert sum(time_s > 50 for time_s in times) / len(times) == pytest.approx(0.054, abs=0.015)
    assert max(times) == 60.0
    assert min(times) >= 0.5


def test_tools_are_as_frequent_as_their_weights_say():
    tools = (Tool(name="a", weight=3, max_s=1.0), Tool(name="b", min_s=5.0, max_s=6.0))
    made = calls(agents(tools=tools, iterations=5))
    assert sum(call.name == "a" for call in made) / len(made) == pytest.approx(0.75, abs=0.03)
    assert all(call.duration_s <= 1.0 for call in made if call.name == "a")
    assert all(5.0 <= call.duration_s <= 6.0 for call in made if call.name == "b")


def test_tools_that_return_together_do_so_at_a_multiple_of_the_period():
    call = calls(agents(tool_period_s=30.0))[0]
    assert call.due_s(1.0) == 30.0
    assert call.due_s(29.0) == 60.0
    assert ToolCall("t", 4.0).due_s(1.5) == 5.5


def test_numbers_with_a_most_are_drawn_between_the_two():
    made = agents(
        iterations=20,
        iterations_max=50,
        context_length=2000,
        context_length_max=2100,
        tool_tokens=10,
        tool_tokens_max=90,
        new_tokens=5,
        new_tokens_max=25,
    )
    counts = [len(agent.steps) - 1 for agent in made]
    assert (min(counts), max(counts)) == (20, 50)
    assert {2000 <= agent.steps[0].input_tokens <= 2100 for agent in made} == {True}
    later = [step for agent in made for step in agent.steps[1:]]
    assert (min(s.input_tokens for s in later), max(s.input_tokens for s in later)) == (10, 90)
    assert (min(s.output_tokens for s in later), max(s.output_tokens for s in later)) == (5, 25)
    limit = shapes.most_tokens(
        msgspec.structs.replace(BASE, iterations_max=3, tool_tokens_max=90, new_tokens=5)
    )
    assert limit == 1024 + 3 * 90 + 4 * 5


def test_an_agent_ends_before_its_context_would_be_too_long():
    made = agents(iterations=50, tool_tokens=100, tool_tokens_max=900, context_limit=8000)
    totals = [agent.context_tokens for agent in made]
    assert max(totals) <= 8000
    # It goes on as long as the next request may fit.
    assert min(totals) > 8000 - 950
    assert shapes.most_tokens(msgspec.structs.replace(BASE, iterations=99, context_limit=8000)) == (
        8000
    )


def test_tenants_have_agents_by_weight():
    tenants = (Tenant(name="large", weight=9), Tenant(name="small"))
    made = agents(tenants=tenants)
    assert sum(agent.tenant == "large" for agent in made) / 400 == pytest.approx(0.9, abs=0.05)
    assert {agent.tenant for agent in agents()} == {""}


def test_a_share_of_the_agents_is_lost_in_one_of_their_tool_calls():
    made = agents(abandon_share=0.25, iterations=4)
    lost = [agent for agent in made if agent.abandons]
    assert len(lost) / 400 == pytest.approx(0.25, abs=0.07)
    assert {len(agent.steps) for agent in lost} == {1, 2, 3, 4}
    assert {len(agent.steps) for agent in made if not agent.abandons} == {5}
    assert not any(agent.abandons for agent in agents())


def test_what_is_added_to_a_workload_leaves_the_rest_as_it_was():
    plain = agents()
    more = agents(tenants=(Tenant(name="x"),), abandon_share=0.0, context_limit=10**6)
    assert [agent.arrival_s for agent in more] == [agent.arrival_s for agent in plain]
    assert [agent.steps for agent in more] == [agent.steps for agent in plain]
