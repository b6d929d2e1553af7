from __future__ import annotations

import json
from pathlib import Path

import pytest

from services.common.errors import ConfigError
from services.worker.front import tokenizer
from tests.support.text_model import BOS, CHATML, END, write_text_model


def test_loading_reads_tokenizer_template_and_special_tokens(tmp_path: Path) -> None:
    text = tokenizer.load(write_text_model(tmp_path))
    assert text.tokenizer.decode(text.encode("hello", first=False)) == "hello"
    assert text.chat_template == CHATML
    assert text.special_tokens == {"bos_token": BOS, "eos_token": END}
    assert text.first_ids == ()


def test_a_begin_of_sequence_token_comes_before_the_first_text_only(tmp_path: Path) -> None:
    text = tokenizer.load(write_text_model(tmp_path, bos=True))
    bos = text.tokenizer.token_to_id(BOS)
    assert text.first_ids == (bos,)
    assert text.encode("x", first=True) == [bos, *text.encode("x", first=False)]
    assert bos not in text.encode("x", first=False)


def test_a_template_file_goes_before_the_configuration(tmp_path: Path) -> None:
    write_text_model(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert tokenizer.load(tmp_path).chat_template == "{{ messages }}"


def test_of_several_templates_the_default_is_taken(tmp_path: Path) -> None:
    write_text_model(tmp_path)
    templates = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    assert tokenizer.load(tmp_path).chat_template == "d"


def test_truncation_saved_with_a_tokenizer_is_undone(tmp_path: Path) -> None:
    write_text_model(tmp_path)
    path = tmp_path / "tokenizer.json"
    saved = json.loads(path.read_text())
    saved["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    path.write_text(json.dumps(saved))
    assert len(tokenizer.load(tmp_path).encode("0123456789", first=False)) == 10


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"config.json": {"eos_token_id": 7}}, (7,)),
        ({"config.json": {"eos_token_id": 7}, "generation_config.json": {"eos_token_id": [1, 2]}},
         (1, 2)),
        ({"config.json": {"eos_token_id": None}}, ()),
        ({}, ()),
    ],
)  # fmt: skip
def test_end_of_sequence_ids_come_from_the_models_files(
    tmp_path: Path, files: dict[str, object], expected: tuple[int, ...]
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert tokenizer.eos_token_ids(tmp_path) == expected


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_file_is_named(tmp_path: Path, name: str) -> None:
    write_text_model(tmp_path)
    (tmp_path / name).write_text("{")
    with pytest.raises(ConfigError, match=f"cannot read .*{name}"):
        tokenizer.load(tmp_path)
