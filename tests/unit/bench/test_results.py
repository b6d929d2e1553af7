"""What benchmarks print and write."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from bench import _results


def test_columns_are_as_wide_as_they_must_be(capsys: pytest.CaptureFixture[str]) -> None:
    _results.print_table(("what", "ratio"), [("a longer name", "1.0"), ("b", "100000.5")])
    assert capsys.readouterr().out.splitlines() == [
        "what              ratio",
        "a longer name       1.0",
        "b              100000.5",
    ]


def arguments(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--floors", type=Path)
    _results.add_json_flag(parser)
    return parser.parse_args(flags)


def test_a_result_says_what_it_was_made_with_and_on(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    args = arguments(f"--json={file}", "--floors=floors.json")

    _results.write(args, "test", "cpu", {"rows": [1]})

    result = json.loads(file.read_text())
    assert result["benchmark"] == "test"
    assert result["settings"] == {"floors": "floors.json"}
    assert result["rows"] == [1]
    assert result["machine"]["cores"] > 0
    assert "gpu" not in result["machine"]
    assert {"python", "torch", "transformers"} <= set(result["versions"])


def test_without_a_file_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _results.write(arguments(), "test", "cpu", {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("says", "expected"),
    [
        ("echo NVIDIA H200, 580.159.04", {"gpu": "NVIDIA H200", "driver": "580.159.04"}),
        ("exit 9", {"gpu": "cuda:1"}),
    ],
)
def test_the_driver_names_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str, expected: dict[str, str]
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f'#!/bin/sh\ntest "$3" = --id=1 || exit 1\n{says}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    file = tmp_path / "result.json"

    _results.write(arguments(f"--json={file}"), "test", "cuda:1", {})

    machine = json.loads(file.read_text())["machine"]
    assert {name: machine.get(name) for name in expected} == expected
