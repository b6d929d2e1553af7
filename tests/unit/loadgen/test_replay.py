from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadgen import config, replay, shapes
from loadgen.config import Workload
from loadgen.errors import WorkloadError
from loadgen.shapes import AgentShape, StepShape, ToolCall
from loadgen.workload import TokenPrompt, plan

FIRST = '{"timestamp": 1500, "session_id": "a", "input_length": 100, "output_length": 5}'
LATER = '{"session_id": "a", "delay": 2500, "tool": "t", "input_length": 7, "output_length": 6}'


def read(tmp_path: Path, *lines: str) -> list[AgentShape]:
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(lines))
    return replay.read(path)


def test_a_session_is_its_lines_in_order(tmp_path):
    (agent,) = read(tmp_path, FIRST, "", LATER)
    assert agent == AgentShape(
        0, "a", 1.5, (StepShape(100, 5), StepShape(7, 6, ToolCall("t", 2.5)))
    )


def test_lines_of_mooncakes_own_traces_are_sessions_by_themselves(tmp_path):
    line = '{"timestamp": %d, "input_length": 6, "output_length": 2, "hash_ids": [1, 2]}'
    late, early = read(tmp_path, line % 2000, line % 1000)[::-1]
    assert (early.name, early.arrival_s, early.index) == ("line-2", 1.0, 0)
    assert (late.name, late.arrival_s, late.index) == ("line-1", 2.0, 1)


def test_other_names_of_the_fields_are_known(tmp_path):
    first = '{"created_time": 5, "session_id": "a", "input_tokens": 3, "output_tokens": 4}'
    later = '{"session_id": "a", "delay_ms": 8, "input_tokens": 3, "output_tokens": 4, "extra": 1}'
    (agent,) = read(tmp_path, first, later)
    assert agent.arrival_s == 0.005
    assert agent.steps == (StepShape(3, 4), StepShape(3, 4, ToolCall("tool", 0.008)))


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ([FIRST, LATER, "{"], r"t\.jsonl:3: Input data was truncated"),
        ([FIRST, "[]"], r"t\.jsonl:2: expected an object"),
        ([FIRST, "", FIRST], r"t\.jsonl:3: delay: missing, and the session has an earlier line"),
        ([FIRST.replace("100", "0")], r"t\.jsonl:1: Expected `int` >= 1"),
        ([FIRST.replace('"output_length": 5', '"x": 5')], r":1: Object missing .*output_length"),
        (
            [FIRST.replace("}", ', "abandons": true}'), LATER],
            r"t\.jsonl:2: the session was abandoned in an earlier line",
        ),
        (
            [FIRST.replace("}", ', "shared_prefix_length": 101}')],
            r":1: shared_prefix_length: expected at most input_length \(100\)",
        ),
        (["\n"], r"t\.jsonl: there is no request in it"),
    ],
)
def test_a_broken_line_is_named_by_its_number_and_nothing_is_skipped(tmp_path, lines, problem):
    with pytest.raises(WorkloadError, match=problem) as caught:
        read(tmp_path, *lines)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(WorkloadError, match=r"none\.jsonl: No such file"):
        replay.read(tmp_path / "none.jsonl")


MILLISECONDS = st.integers(0, 10**9).map(lambda microseconds: round(microseconds / 1e6, 6))
STEPS = st.builds(
    StepShape,
    st.integers(1, 10**6),
    st.integers(1, 10**6),
    st.builds(ToolCall, st.sampled_from(["a", "b"]), MILLISECONDS, st.sampled_from([0.0, 30.0])),
)


@settings(deadline=None)
@given(
    st.lists(st.tuples(MILLISECONDS, st.lists(STEPS, max_size=4), st.booleans()), min_size=1),
    st.sampled_from(["", "acme"]),
)
def test_what_is_written_is_read_again(tmp_path_factory, made, tenant):
    agents = [
        AgentShape(index, f"s{index}", arrival_s, (StepShape(9, 1), *steps), tenant, 5, gone)
        for index, (arrival_s, steps, gone) in enumerate(sorted(made, key=lambda agent: agent[0]))
    ]
    path = tmp_path_factory.mktemp("trace") / "t.jsonl"
    path.write_bytes(b"".join(replay.write(agents)))
    assert replay.read(path) == agents


def test_an_export_is_the_same_for_the_same_seed():
    workload = Workload(total_agents=20, arrival_rate=1, think_time_min=1, think_time_max=2)
    first, again = (b"".join(replay.write(shapes.agents(workload))) for _ in range(2))
    other = msgspec.structs.replace(workload, seed=1)
    assert first == again
    assert first != b"".join(replay.write(shapes.agents(other)))


def test_a_workload_may_be_a_trace_beside_its_file(tmp_path):
    (tmp_path / "t.jsonl").write_text(f"{FIRST}\n{LATER}\n")
    (tmp_path / "w.yaml").write_text("workload:\n  replay: t.jsonl\n  mode: live\n")
    workload = config.load(tmp_path / "w.yaml").workload
    assert workload.total_agents == 1
    (agent,) = plan(workload, 50)
    assert agent.name == "a"
    prompts = [step.prompt for step in agent.steps]
    assert [len(p.ids) for p in prompts if isinstance(p, TokenPrompt)] == [100, 7]
    (tmp_path / "t.jsonl").write_text("{\n")
    with pytest.raises(WorkloadError, match=r"t\.jsonl:1:"):
        config.load(tmp_path / "w.yaml")
