"""What ``--model`` may be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from services.common.errors import ConfigError
from services.common.model_files import (
    ModelKind,
    cache_folder,
    model_kind,
    smollm2_folder,
    tokenizer_source,
)


def test_names_are_told_apart(tmp_path: Path) -> None:
    assert model_kind("smollm2") is ModelKind.SMOLLM2
    assert model_kind("dummy:tiny") is ModelKind.DUMMY
    assert model_kind(str(tmp_path)) is ModelKind.FOLDER
    assert model_kind("org/name") is ModelKind.HUB
    assert model_kind("gpt2") is ModelKind.HUB


@pytest.mark.parametrize("name", ["/no/such", "./no-such", "~/no/such", "a/b/c", ""])
def test_what_can_only_be_a_path_must_be_there(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--model {name}: no such folder"):
        model_kind(name)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.touch()
    with pytest.raises(ConfigError, match="is a file, a folder is needed"):
        model_kind(str(file))


def test_a_folder_named_as_a_hub_id_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert model_kind("org/name") is ModelKind.FOLDER


def test_the_cache_is_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DJINN_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    assert smollm2_folder().parent == tmp_path
    monkeypatch.delenv("DJINN_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "djinn"


def test_tokenizers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DJINN_CACHE", str(tmp_path))
    assert tokenizer_source("dummy:tiny") is None
    assert tokenizer_source("org/name") == "org/name"
    with pytest.raises(ConfigError, match=r"--model smollm2: its tokenizer is not in .* yet"):
        tokenizer_source("smollm2")
    smollm2_folder().mkdir()
    (smollm2_folder() / "tokenizer.json").touch()
    assert tokenizer_source("smollm2") == str(smollm2_folder())


def test_a_folder_has_a_tokenizer_or_not(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json in"):
        tokenizer_source(str(tmp_path))
    (tmp_path / "config.json").touch()
    assert tokenizer_source(str(tmp_path)) is None
    (tmp_path / "tokenizer.json").touch()
    assert tokenizer_source(str(tmp_path)) == str(tmp_path)


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import services.common.model_files, sys;"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
