"""The model's tokenizer in the front process, without torch.

`tokenizer.json` is read by the tokenizers library itself, for importing transformers would bring
torch into this process: seconds of start and hundreds of megabytes. A folder that has only an
older vocabulary format is converted once, by transformers, in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from services.common.errors import ConfigError

_CONVERT = """
import sys
from transformers import AutoTokenizer
AutoTokenizer.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])
"""
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


@dataclass(frozen=True)
class TextModel:
    """What is needed to turn text into a model's tokens and back.

    Attributes:
        tokenizer: Encodes and decodes.
        first_ids: Ids put before the first text of a session: the begin-of-sequence token, for
            models that have one.
        chat_template: Jinja source; None: the model has none.
        special_tokens: Texts that a chat template may name, such as ``eos_token``.
    """

    tokenizer: Tokenizer
    first_ids: tuple[int, ...] = ()
    chat_template: str | None = None
    special_tokens: dict[str, str] = field(default_factory=dict)

    def encode(self, text: str, *, first: bool) -> list[int]:
        """Returns the ids of `text`.

        Args:
            text: What to tokenize; special tokens written in it become those tokens.
            first: True if it begins a session, so that `first_ids` go before it.
        """
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return [*self.first_ids, *ids] if first else ids


def local_folder(source: str) -> Path:
    """Returns the folder of a model's small files, fetched from the hub if need be.

    Args:
        source: A folder or a hub id.

    Raises:
        ConfigError: They cannot be fetched.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=["*.json", "*.jinja", "*.model"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        line = str(error).strip().splitlines()[0]
        raise ConfigError(f"--model {source}: cannot fetch its tokenizer: {line}") from error


def load(folder: Path) -> TextModel:
    """Loads the tokenizer of a model folder.

    Raises:
        ConfigError: The folder has no tokenizer, or one that cannot be read.
    """
    if (folder / "tokenizer.json").is_file():
        return _read(folder)
    with tempfile.TemporaryDirectory(prefix="djinn-tokenizer-") as converted:
        done = subprocess.run(
            [sys.executable, "-c", _CONVERT, str(folder), converted],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines()
            raise ConfigError(f"no tokenizer in {folder}: {lines[-1] if lines else 'none found'}")
        return _read(Path(converted))


def eos_token_ids(folder: Path) -> tuple[int, ...]:
    """Returns the ids that end a generation, as the model's own files name them.

    Raises:
        ConfigError: A file that names them cannot be read.
    """
    for name in ("generation_config.json", "config.json"):
        ids = _read_json(folder / name).get("eos_token_id")
        if isinstance(ids, int):
            return (ids,)
        if isinstance(ids, list):
            return tuple(int(i) for i in ids)
    return ()


def _read(folder: Path) -> TextModel:
    path = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower class for a bad file
        raise ConfigError(f"cannot read {path}: {error}") from error
    # A tokenizer saved while it truncated or padded would do so here too.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    config = _read_json(folder / "tokenizer_config.json")
    special = _read_json(folder / "special_tokens_map.json")
    names = {}
    for name in _SPECIAL_NAMES:
        value = config.get(name) or special.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            names[name] = content
    return TextModel(tokenizer, _first_ids(tokenizer), _chat_template(folder, config), names)


def _first_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Returns the special tokens the tokenizer itself puts before a text."""
    encoding = tokenizer.encode("a", add_special_tokens=True)
    first: list[int] = []
    for token_id, special in zip(encoding.ids, encoding.special_tokens_mask, strict=True):
        if not special:
            break
        first.append(token_id)
    return tuple(first)


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name, of which one is for plain conversations
        template = {str(each.get("name")): each.get("template") for each in template}.get("default")
    return template if isinstance(template, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    return content if isinstance(content, dict) else {}
