"""The step benchmark on a model small enough for a test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench.step import Shape, Speeds, default_shapes, floor_s, main, make_plan
from tests.support.model_driver import load_quietly


def test_the_floor_counts_what_must_be_read_or_multiplied() -> None:
    loaded = load_quietly("dummy:tiny")
    generator = torch.Generator().manual_seed(0)
    plan = make_plan(Shape("decode", 3, 100, 1), [[0]] * 3, loaded.vocab_size, generator)
    weights = sum(weight.numel() for weight in loaded.model.parameters()) - 1024 * 128
    read = 4 * (weights + 3 * 101 * 2 * 4 * 2 * 32)
    assert floor_s(loaded, plan, Speeds(1e9, 1e30)) == pytest.approx(read / 1e9)
    head = 1024 * 128
    flops = 3 * (2 * weights + 4 * 4 * 4 * 32 * 101)
    assert floor_s(loaded, plan, Speeds(1e30, 1e9)) == pytest.approx(flops / 1e9)
    assert head < weights


def test_a_mixed_shape_has_decodes_and_then_a_prompt() -> None:
    mixed = default_shapes([2, 4], 300)[-1]
    plan = make_plan(mixed, [[0]] * 3, 10, torch.Generator().manual_seed(0))
    assert [(part.start, len(part.token_ids)) for part in plan.slices] == [
        (300, 1),
        (300, 1),
        (0, 256),
    ]


def test_it_prints_a_table_and_writes_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "step.json"
    code = main(["--batch", "1", "2", "--context", "40", "--rounds", "2", "--json", str(file)])
    assert code == 0
    printed = capsys.readouterr().out
    assert "ratio" in printed
    assert "decode 2" in printed
    rows = json.loads(file.read_text())["rows"]
    assert [row["shape"]["name"] for row in rows] == [
        "decode 1",
        "decode 2",
        "append 32 to 14 x1",
        "append 32 to 14 x8",
        "prefill 40 x1",
        "prefill 40 x4",
        "decode 1 + 256 of a prompt",
    ]
    assert all(row["ratio"] > 0 for row in rows)
