"""What a model's steps and copies take at least, and the benchmark that measures the machine."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import _floors, floors
from bench._floors import Speeds, StepShape
from services.common.errors import ConfigError
from tests.support.model_driver import load_quietly

MODEL = _floors.model_shape("dummy:tiny", "cpu")
SPEEDS = Speeds(1e9, 1e30, 5e8, 4e8)


def test_a_models_shape_is_that_of_its_weights() -> None:
    loaded = load_quietly("dummy:tiny")
    embedding = loaded.model.get_input_embeddings().weight.numel()
    weights = sum(weight.numel() for weight in loaded.model.parameters())
    assert MODEL.parameters_read == weights - embedding
    assert (MODEL.layers, MODEL.kv_heads, MODEL.head_dim) == (
        loaded.num_layers,
        loaded.num_kv_heads,
        loaded.head_dim,
    )
    assert (MODEL.dtype, MODEL.vocab_size) == (loaded.dtype, loaded.vocab_size)


def test_a_shape_without_weights_is_as_large_as_the_real_one() -> None:
    llama = _floors.model_shape("dummy:llama-2-7b", "cuda")
    assert llama.dtype is torch.bfloat16
    assert llama.token_bytes == 32 * 2 * 4096 * 2
    assert llama.parameters_read == pytest.approx(6.607e9, rel=1e-3)
    assert llama.chosen_layout("cuda:0").block_bytes == 8 << 20


def test_the_floor_counts_what_must_be_read_or_multiplied() -> None:
    parts = StepShape("decode", 3, 100, 1).parts()
    read = 4 * (MODEL.parameters_read + 3 * 101 * 2 * 4 * 2 * 32)
    assert _floors.step_floor_s(MODEL, parts, SPEEDS) == pytest.approx(read / 1e9)
    flops = 3 * (2 * MODEL.parameters_read + 4 * 4 * 4 * 32 * 101)
    quick = replace(SPEEDS, memory_bytes_per_s=1e30, product_flops=1e9)
    assert _floors.step_floor_s(MODEL, parts, quick) == pytest.approx(flops / 1e9)


def test_logits_are_made_for_one_token_of_a_prompt() -> None:
    one, two = (_floors.step_flops(MODEL, [(0, count)]) for count in (1, 2))
    layers = MODEL.parameters_read - MODEL.head_parameters
    attention = 4 * 4 * 4 * 32 * 2
    assert two - one == 2 * layers + attention


def test_a_restore_copies_the_kv_at_load_speed() -> None:
    assert _floors.restore_floor_s(MODEL, 10, SPEEDS) == 10 * MODEL.token_bytes / 5e8


def test_a_mixed_step_has_decodes_and_then_a_prompt() -> None:
    mixed = _floors.default_steps([2, 4], 300)[-1]
    assert mixed.parts() == [(300, 1), (300, 1), (0, 256)]


@pytest.mark.parametrize(("model", "dtype"), [("dummy:huge", "auto"), ("dummy:tiny", "round")])
def test_what_is_not_there_is_refused(model: str, dtype: str) -> None:
    with pytest.raises(ConfigError, match=r"huge|round"):
        _floors.model_shape(model, "cpu", dtype)


def test_the_benchmarks_file_is_what_others_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "floors.json"

    code = floors.main(["--copy-mib", "1", "--rounds", "1", "--batch", "1", "--json", str(file)])

    assert code == 0
    printed = capsys.readouterr().out
    assert "ratio" in printed
    assert "restore 1074" in printed
    result = json.loads(file.read_text())
    assert {row["direction"] for row in result["copies"]} == {
        "to the device",
        "to the host",
        "both at once, each",
    }
    assert all(row["floor_ms"] > 0 for row in result["floors"])
    assert result["settings"]["batch"] == [1]
    assert result["versions"]["torch"]
    parser = argparse.ArgumentParser()
    _floors.add_floors_flags(parser)
    args = parser.parse_args(["--floors", str(file), "--tflops", "2"])
    speeds = _floors.chosen_speeds(args, measure=pytest.fail)
    assert speeds.product_flops == 2e12
    assert speeds.load_bytes_per_s == result["speeds"]["load_bytes_per_s"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"speeds": {"load_bytes_per_s": 1}}'])
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "floors.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"floors\.json: not a result"):
        _floors.read_speeds(file)
