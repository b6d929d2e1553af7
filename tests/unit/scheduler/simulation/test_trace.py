import pytest

from services.common.errors import ConfigError
from services.scheduler.simulation import trace
from services.scheduler.simulation.trace import TracedAgent, TracedStep

FIRST = '{"timestamp": 1500, "session_id": "a", "input_length": 100, "output_length": 5}'
LATER = '{"session_id": "a", "delay": 2500, "tool": "t", "input_length": 7, "output_length": 6}'
OTHER = (
    '{"timestamp": 10, "session_id": "b", "input_length": 1, "output_length": 1, '
    '"tenant": "acme", "abandons": true}'
)


def read(tmp_path, *lines: str) -> list[TracedAgent]:
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return trace.read(path)


def test_sessions_come_in_order_of_arrival_with_times_in_seconds(tmp_path):
    assert read(tmp_path, FIRST, LATER, "", OTHER) == [
        TracedAgent("b", 0.01, "acme", 0, True, [TracedStep(1, 1)]),
        TracedAgent("a", 1.5, "", 0, False, [TracedStep(100, 5), TracedStep(7, 6, "t", 2.5)]),
    ]


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ([FIRST, "{"], r"t\.jsonl:2: Input data was truncated"),
        ([FIRST, LATER.replace("2500", "-1")], r"t\.jsonl:2: Expected `float` >= 0"),
        ([FIRST, "", FIRST], r"t\.jsonl:3: delay: missing"),
        ([OTHER, OTHER.replace("timestamp", "delay")], r"t\.jsonl:2: comes after a line that aba"),
        ([FIRST.replace("100", '"x"')], r"t\.jsonl:1: Expected `int`, got `str`"),
        ([""], r"t\.jsonl: there is no agent in it"),
    ],
)
def test_a_broken_line_is_named_by_its_number(tmp_path, lines, problem):
    with pytest.raises(ConfigError, match=problem):
        read(tmp_path, *lines)


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.jsonl: No such file"):
        trace.read(tmp_path / "none.jsonl")
