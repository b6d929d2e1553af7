from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from loadgen import config
from loadgen.config import Mode, Prompts
from loadgen.errors import WorkloadError

CONFIGS = Path(config.__file__).parent / "configs"
VALID = """\
workload:
  total_agents: 10
  arrival_rate: 0.5
  think_time_min: 2.0
  think_time_max: 5.0
"""


def problem(text: str) -> str:
    with pytest.raises(WorkloadError) as caught:
        config.parse(text, "w.yaml")
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_hero_is_read_as_it_stands():
    loaded = config.load(CONFIGS / "agent_scaling_hero.yaml")
    assert loaded.experiment.name == "semantic_scheduler_hero"
    assert loaded.workload.total_agents == 80
    assert loaded.workload.arrival_rate == 0.2
    assert (loaded.workload.think_time_min, loaded.workload.think_time_max) == (10.0, 20.0)
    assert loaded.expected_results == {
        "p99_wake_latency_ms": 500,
        "p99_request_latency_ms": 3000,
        "swaps_gt": 100,
    }


def test_smoke_test_gets_the_defaults():
    loaded = config.load(CONFIGS / "poisson_smoke_test.yaml")
    assert loaded.experiment.name == "poisson_smoke_test"
    workload = loaded.workload
    assert (workload.new_tokens, workload.context_length, workload.iterations) == (50, 1024, 1)
    assert (workload.tool_tokens, workload.shared_prefix_tokens, workload.seed) == (32, 0, 0)
    assert workload.mode is Mode.OPEN
    assert workload.prompts is Prompts.TOKENS
    assert not workload.oracle


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_file_is_valid(path):
    config.load(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "w.yaml: expected a mapping with the key 'workload', got nothing"),
        ("workload: 3", "w.yaml:1: workload: expected a mapping, got 3"),
        (
            VALID.replace("10", "ten"),
            "w.yaml:2: workload.total_agents: expected a whole number, got the text 'ten'",
        ),
        (
            VALID.replace("10", "0"),
            "w.yaml:2: workload.total_agents: expected a whole number, at least 1, got 0",
        ),
        (
            VALID.replace("0.5", "-1"),
            "w.yaml:3: workload.arrival_rate: expected a number, above 0.0, got -1",
        ),
        (
            VALID.replace("5.0", ".inf"),
            "w.yaml:5: workload.think_time_max: expected a finite number, got inf",
        ),
        (
            VALID.replace("5.0", "1"),
            "w.yaml:5: workload.think_time_max: expected at least think_time_min (2.0), got 1.0",
        ),
        (VALID + "  modee: live\n", "w.yaml:6: workload.modee: unknown key; did you mean mode?"),
        (VALID + "  mode: x\n", "w.yaml:6: workload.mode: expected open or live, got the text 'x'"),
        (
            VALID + "  prompts: [a]\n",
            "w.yaml:6: workload.prompts: expected tokens or stories, got a list",
        ),
        (VALID + "  oracle: 3\n", "w.yaml:6: workload.oracle: expected true or false, got 3"),
        (VALID + "  seed:\n", "w.yaml:6: workload.seed: expected a whole number, got nothing"),
        (
            VALID + "  seed: 1\n  seed: 2\n",
            "w.yaml:7: workload.seed: given twice, first in line 6",
        ),
        (
            VALID + "  context_length: 8\n  shared_prefix_tokens: 9\n",
            "w.yaml:7: workload.shared_prefix_tokens: expected at most context_length (8), got 9",
        ),
        (VALID.replace("  arrival_rate: 0.5\n", ""), "w.yaml:1: workload.arrival_rate: missing"),
        ("1: 2\n", "w.yaml: the file: a key is not text"),
        (
            VALID + "  tools:\n    - name: a\n      max_s: 1\n    - name: b\n      weight: -1\n",
            "w.yaml:10: workload.tools[1].weight: expected a number, above 0.0, got -1",
        ),
        (
            VALID + "  tools:\n    - nam: a\n",
            "w.yaml:7: workload.tools[0].nam: unknown key; did you mean name?",
        ),
        (
            VALID + "  tools: [{name: a}]\n",
            "w.yaml:6: workload.tools[0]: expected median_s or max_s",
        ),
        (
            VALID + "  tools: [{name: a, min_s: 3, max_s: 2}]\n",
            "w.yaml:6: workload.tools[0].max_s: expected at least min_s (3.0), finite, got 2.0",
        ),
        (
            VALID + "  tenants: [{name: a, weight: .inf}]\n",
            "w.yaml:6: workload.tenants[0].weight: expected a finite number, got inf",
        ),
        (
            VALID + "  tenants: [a]\n",
            "w.yaml:6: workload.tenants[0]: expected a mapping, got the text 'a'",
        ),
        (
            VALID + "  iterations: 5\n  iterations_max: 4\n",
            "w.yaml:7: workload.iterations_max: expected at least iterations (5), got 4",
        ),
        (
            VALID + "  context_limit: 1000\n",
            "w.yaml:6: workload.context_limit: expected at least 1074, got 1000",
        ),
        (
            VALID + "  abandon_share: 2\n",
            "w.yaml:6: workload.abandon_share: expected a number, at most 1.0, got 2",
        ),
    ],
)
def test_errors_name_line_key_value_and_what_is_allowed(text, expected):
    assert problem(text) == expected


def test_a_name_that_is_no_file_name_is_refused():
    message = problem(VALID + "experiment:\n  name: a/b\n")
    assert message.startswith("w.yaml:7: experiment.name: expected at most 100 letters, digits")
    assert message.endswith("got 'a/b'")


def test_malformed_yaml_names_its_line():
    assert problem("workload:\n\t- x").startswith("w.yaml:2: not valid YAML: found character")
    assert problem("workload: [1,\n  2\n").startswith("w.yaml:3: not valid YAML: ")


STRANGE = ["a: 2020-13-45", "[" * 5000, "a: &x {a: *x}", "a: 0b", "? {a: 1}"]


@pytest.mark.parametrize("text", STRANGE)
def test_strange_yaml_is_refused_in_one_line(text):
    assert problem(text).startswith("w.yaml")


def test_missing_and_unreadable_files_are_one_line_errors(tmp_path):
    with pytest.raises(WorkloadError, match=r"nowhere\.yaml: No such file or directory"):
        config.load(tmp_path / "nowhere.yaml")
    with pytest.raises(WorkloadError, match="Is a directory"):
        config.load(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"\xe9")
    with pytest.raises(WorkloadError, match="not UTF-8"):
        config.load(tmp_path / "latin.yaml")


def test_overrides_replace_values_and_are_checked_like_them():
    loaded = config.parse(VALID, "w.yaml", {"workload.seed": "7", "workload.mode": "live"})
    assert loaded.workload.seed == 7
    assert loaded.workload.mode is Mode.LIVE
    with pytest.raises(WorkloadError, match=r"workload\.sed: unknown key; did you mean seed"):
        config.parse(VALID, "w.yaml", {"workload.sed": "7"})
    with pytest.raises(WorkloadError, match=r"--set workload\.seed\.x: seed is not a mapping"):
        config.parse(VALID + "  seed: 1\n", "w.yaml", {"workload.seed.x": "7"})


@settings(deadline=None)
@given(st.text(max_size=200))
def test_any_text_is_read_or_refused_in_one_line(text):
    assert refusal(text).startswith(("w.yaml", "accepted"))


def refusal(text: str, overrides: dict[str, str] | None = None) -> str:
    """Returns the error's message, or "accepted"."""
    try:
        config.parse(text, "w.yaml", overrides)
    except WorkloadError as error:
        return str(error)
    return "accepted"


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(config.Workload.__struct_fields__),
        st.one_of(
            st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.integers())
        ),
    )
)
def test_any_value_is_taken_or_refused_by_name(values):
    overrides = {f"workload.{name}": value for name, value in values.items()}
    texts = {key: yaml.safe_dump(value).removesuffix("...\n") for key, value in overrides.items()}
    message = refusal(VALID, texts)
    assert message == "accepted" or any(name in message for name in values)
    assert "\n" not in message
