import itertools
from pathlib import Path

import pytest

from loadgen import config, systems
from loadgen.errors import LoadgenError
from loadgen.systems import System
from loadgen.targets.options import OpenAIOptions

SHIPPED = Path(config.__file__).parent / "configs" / "systems" / "compare_cpu.yaml"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "some.yaml"
    path.write_text(
        "one: {command: 'djinn-server --port {port}'}\n"
        "two:\n  target: openai\n  server: http://host:8000\n  openai: {model: m, text: true}\n"
    )
    return path


def test_a_system_is_an_address_or_a_command():
    found = systems.parse_items(
        ["here=localhost:5556", "other=https://host/v1", "new=djinn-server --port {port}"]
    )
    assert found == {
        "here": System(server="localhost:5556"),
        "other": System(target="openai", server="https://host/v1"),
        "new": System(command="djinn-server --port {port}"),
    }


def test_a_file_has_several(file):
    found = systems.parse_items([f"{file}:two", f"{file}:one"])
    assert list(found) == ["two", "one"]
    assert found["two"] == System(
        target="openai", server="http://host:8000", openai=OpenAIOptions(model="m", text=True)
    )
    assert set(systems.parse_items([str(file)])) == {"one", "two"}


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["vllm"], "vllm: unknown system; expected FILE.yaml"),
        (["a=h:1", "a=h:2"], "a is given twice"),
        (["a="], "expected an address or a command after ="),
        (["a=djinn-server"], "expected {port} in the command, or server"),
        (["a=djinn-server '{port}"], "command: No closing quotation"),
        (["none.yaml"], "none.yaml: No such file or directory"),
        (["FILE:three"], "unknown system three; known are one, two"),
        (["FILE:tw"], "unknown system tw; did you mean two?"),
    ],
)
def test_what_is_no_system_is_said_in_one_line(items, message, file):
    with pytest.raises(LoadgenError) as caught:
        systems.parse_items([item.replace("FILE", str(file)) for item in items])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a mapping of names to systems"),
        ("a: [", "not valid YAML"),
        ("a:\n  comand: x", ":2: comand: unknown key; did you mean command?"),
        ("a:\n  target: vllm", "target: "),
        (
            "a:\n  server: h:1\n  openai: {modle: m}",
            "openai.modle: unknown key; did you mean model",
        ),
        ("a: {}", ":1: a: expected command or server"),
        ("a: {server: 'h:{port}'}", "{port} is for a system with a command"),
        ("a: {server: 'h:1'}\na: {server: 'h:2'}", ":2: a: given twice, first in line 1"),
        ("'a b': {server: 'h:1'}", "a system's name is of letters"),
        ("a: {server: 'h:1', ready_timeout_s: 0}", "ready_timeout_s: expected a number, above 0"),
    ],
)
def test_a_malformed_file_is_refused_with_its_place(text, message, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(LoadgenError) as caught:
        systems.load(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_command_is_filled_in(monkeypatch):
    monkeypatch.setenv("SOME_DIR", "/some where")
    system = System(command="{python} ${SOME_DIR}/x --json '{\"a\": 1}' --port={port} $$HOME")
    words = systems.command_of(system, 81)
    assert words[1:] == ["/some where/x", "--json", '{"a": 1}', "--port=81", "$HOME"]
    assert Path(words[0]).name.startswith("python")


def test_a_variable_that_is_not_set_is_named(monkeypatch):
    monkeypatch.delenv("VLLM_PYTHON", raising=False)
    with pytest.raises(LoadgenError, match="the environment has no variable VLLM_PYTHON"):
        systems.command_of(System(command="$VLLM_PYTHON {port}"), 1)
    with pytest.raises(LoadgenError, match=r"not a variable after \$"):
        systems.command_of(System(command="a $ {port}"), 1)


def test_each_target_has_its_usual_address():
    assert systems.server_of(System(command="x"), 7) == "localhost:7"
    assert systems.server_of(System(command="x", target="openai"), 7) == "http://localhost:7"
    assert systems.server_of(System(command="x", server="[::1]:{port}"), 7) == "[::1]:7"


def test_the_shipped_systems_have_the_same_budget(monkeypatch):
    monkeypatch.setenv("VLLM_PYTHON", "python")
    monkeypatch.setenv("MODEL", "folder")
    budgets = {}
    for name, system in systems.load(SHIPPED).items():
        words = systems.command_of(system, 1)
        flags = dict(itertools.pairwise(words))
        gib = float(flags.get("--device-pool-gib", 0))
        budgets[name] = int(flags.get("--kv-cache-memory-bytes", gib * 2**30))
        assert flags["--dtype"] == "float32"
    assert len(budgets) == 3
    assert set(budgets.values()) == {134_217_728}
