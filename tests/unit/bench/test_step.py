"""The step benchmark on a model small enough for a test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import _floors, floors
from bench._floors import Speeds, StepShape
from bench._runner_steps import make_plan
from bench.step import main

SPEEDS = {
    "memory_bytes_per_s": 1e10,
    "product_flops": 1e11,
    "load_bytes_per_s": 1e9,
    "store_bytes_per_s": 1e9,
}
SMALL = ["--batch", "1", "2", "--context", "40", "--rounds", "4"]


def run(tmp_path: Path, *flags: str) -> list[dict]:
    result, speeds = tmp_path / "step.json", tmp_path / "floors.json"
    speeds.write_text(json.dumps({"speeds": SPEEDS}))
    code = main([*SMALL, f"--floors={speeds}", f"--json={result}", *flags])
    assert code == 0
    rows: list[dict] = json.loads(result.read_text())["rows"]
    return rows


def test_a_plan_is_what_the_shape_says() -> None:
    mixed = StepShape("mixed", 3, 300, 0)
    plan = make_plan(mixed.parts(), [[0]] * 3, 10, torch.Generator().manual_seed(0))
    assert [(part.start, len(part.token_ids)) for part in plan.slices] == [
        (300, 1),
        (300, 1),
        (0, 256),
    ]


def test_steps_of_the_runner(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(tmp_path)
    assert [row["shape"]["name"] for row in rows] == [
        "decode 1",
        "decode 2",
        "append 32 to 14 x1",
        "append 32 to 14 x8",
        "prefill 40 x1",
        "prefill 40 x4",
        "decode 1 + 256 of a prompt",
    ]
    assert all(row["ratio"] == pytest.approx(row["step_ms"] / row["floor_ms"]) for row in rows)
    printed = capsys.readouterr().out
    assert "ratio" in printed
    assert "decode 2" in printed


def test_steps_of_the_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(tmp_path, "--engine", "--host-pool-gib=0.01")
    assert [row["shape"]["name"] for row in rows] == [
        "decode 1",
        "decode 2",
        "append 32 to 14 x1",
        "append 32 to 14 x8",
        "prefill 40 x1",
        "prefill 40 x4",
    ]
    assert [row["idle"] is None for row in rows] == [False, False, True, True, True, True]
    assert all(0 <= row["idle"] <= 1 for row in rows[:2])
    assert all(row["ratio"] == pytest.approx(row["step_ms"] / row["floor_ms"]) for row in rows)
    assert "ratio" in capsys.readouterr().out


def test_without_a_file_the_machine_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(floors, "measure", lambda device, dtype: Speeds(**SPEEDS))
    result = tmp_path / "step.json"
    flags = ["--batch=1", "--context=20", "--rounds=1", "--bandwidth-tb-s=0.02"]
    assert main([*flags, f"--json={result}"]) == 0
    written = json.loads(result.read_text())
    assert written["speeds"] == {**SPEEDS, "memory_bytes_per_s": 2e10}
    model = _floors.model_shape("dummy:tiny", "cpu")
    first = written["rows"][0]
    expected_s = _floors.step_floor_s(model, [(20, 1)], Speeds(**written["speeds"]))
    assert first["floor_ms"] == pytest.approx(expected_s * 1e3)


def test_an_unknown_model_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "dummy:huge"]) == 2
    assert "dummy:huge" in capsys.readouterr().err
