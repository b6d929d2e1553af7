"""Loading models: what comes back, and one clear line for whatever cannot be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from services.common.errors import ConfigError
from services.worker.config import EngineConfig
from services.worker.engine.model_loader import load
from services.worker.engine.models.any import ATTENTION_NAME
from tests.support.model_driver import load_quietly


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=[5, 6],
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_dummy_is_what_its_name_says() -> None:
    loaded = load_quietly("dummy:tiny")
    assert loaded.name == "dummy:tiny"
    assert (loaded.num_layers, loaded.num_query_heads, loaded.num_kv_heads) == (4, 4, 2)
    assert (loaded.head_dim, loaded.vocab_size, loaded.max_context_length) == (32, 1024, 4096)
    assert loaded.dtype is torch.float32
    assert loaded.device == torch.device("cpu")
    assert loaded.eos_token_ids == ()
    assert not loaded.model.training
    assert loaded.model.config._attn_implementation == ATTENTION_NAME


def test_the_same_seed_gives_the_same_weights_and_fingerprint() -> None:
    first, again = load_quietly("dummy:tiny", seed=3), load_quietly("dummy:tiny", seed=3)
    other = load_quietly("dummy:tiny", seed=4)
    for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert first.fingerprint == again.fingerprint
    assert first.fingerprint != other.fingerprint
    assert not torch.equal(first.model.lm_head.weight, other.model.lm_head.weight)


def test_dummy_weights_are_of_the_usual_scale_and_norms_are_one() -> None:
    model = load_quietly("dummy:tiny").model
    assert model.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert bool((model.model.norm.weight == 1).all())


def test_a_folder_is_loaded_in_float32_on_the_cpu_unless_told(folder: Path) -> None:
    loaded = load_quietly(str(folder))
    assert loaded.dtype is torch.float32
    assert loaded.eos_token_ids == (5, 6)
    assert loaded.max_context_length == 128
    assert (loaded.num_kv_heads, loaded.head_dim) == (2, 8)
    as_is = load_quietly(str(folder), dtype="bfloat16")
    assert as_is.dtype is torch.bfloat16
    assert as_is.fingerprint != loaded.fingerprint


def test_the_fingerprint_follows_the_weights(folder: Path) -> None:
    before = load_quietly(str(folder)).fingerprint
    assert load_quietly(str(folder)).fingerprint == before
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.norm.weight.data[0] = 2.0
    model.save_pretrained(folder)
    assert load_quietly(str(folder)).fingerprint != before


def test_progress_is_reported_to_its_end() -> None:
    told: list[tuple[str, float]] = []
    load(EngineConfig(model="dummy:tiny"), lambda what, done: told.append((what, done)))
    assert told[-1][1] == 1.0
    assert all(what and 0 <= done <= 1 for what, done in told)


def test_the_context_can_be_cut_but_not_stretched(folder: Path) -> None:
    assert load_quietly(str(folder), max_context_length=100).max_context_length == 100
    with pytest.raises(ConfigError, match="--max-context-length 129: the model's limit is 128"):
        load_quietly(str(folder), max_context_length=129)
    with pytest.raises(ConfigError, match="--max-context-length 0: at least 1"):
        load_quietly(str(folder), max_context_length=0)


def test_cpu_threads_are_set() -> None:
    before = torch.get_num_threads()
    try:
        load_quietly("dummy:tiny", cpu_threads=1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"model": "dummy:huge"}, "--model dummy:huge: unknown shape, use one of .*dummy:tiny"),
        ({"model": "dummy:tiny", "dtype": "int8"}, "--dtype int8: use auto, float32"),
        ({"model": "dummy:tiny", "device": "tpu"}, "--device tpu: use cpu, cuda"),
        ({"model": "dummy:tiny", "device": "mps"}, "--device mps: use cpu, cuda"),
        ({"model": "dummy:tiny", "cpu_threads": 0}, "--cpu-threads 0: at least 1"),
        ({"model": "/no/such/folder"}, "--model /no/such/folder: no such folder"),
        ({"model": ""}, "--model : no such folder"),
    ],
)
def test_what_cannot_be_is_one_line(settings: dict[str, object], line: str) -> None:
    with pytest.raises(ConfigError, match=line) as raised:
        load_quietly(**settings)  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_without_a_gpu_is_one_line() -> None:
    with pytest.raises(ConfigError, match="--device cuda: no CUDA device"):
        load_quietly("dummy:tiny", device="cuda")


def test_a_folder_without_a_configuration_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json in "):
        load_quietly(str(tmp_path))


def test_a_folder_without_weights_is_one_line(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(ConfigError, match="no weights"):
        load_quietly(str(folder))


def test_a_folder_with_a_broken_configuration_is_one_line(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="--model") as raised:
        load_quietly(str(folder))
    assert "\n" not in str(raised.value)


def test_a_folder_with_broken_weights_is_one_line(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ConfigError, match="--model") as raised:
        load_quietly(str(folder))
    assert "\n" not in str(raised.value)


def test_a_folder_that_lacks_a_weight_is_one_line(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    del model.model.layers[1].mlp.up_proj
    model.save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"--model .* lacks model\.layers\.1\.mlp\.up_proj"):
        load_quietly(str(folder))


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="--model nobody/nothing: no such folder") as raised:
        load_quietly("nobody/nothing")
    assert "\n" not in str(raised.value)


def test_loading_reads_no_other_file_than_the_folders(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    assert load_quietly(f".{os.sep}model").name == "./model"
