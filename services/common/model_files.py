"""Where a model's files are: what ``--model`` may be, without loading anything.

Both processes of a worker use this: the engine for the weights, the front for the tokenizer.
"""

from __future__ import annotations

import os
from enum import Enum, auto
from pathlib import Path

from services.common.errors import ConfigError

SMOLLM2 = "smollm2"
DUMMY_PREFIX = "dummy:"


class ModelKind(Enum):
    """Where a model comes from."""

    SMOLLM2 = auto()
    DUMMY = auto()
    FOLDER = auto()
    HUB = auto()


def cache_folder() -> Path:
    """Returns the folder for converted models, ``$DJINN_CACHE`` or ``~/.cache/djinn``."""
    configured = os.environ.get("DJINN_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "djinn"


def smollm2_folder() -> Path:
    """Returns where the engine puts the converted SmolLM2; it may not be there yet."""
    return cache_folder() / "smollm2-135m-instruct-v1"


def model_kind(model: str) -> ModelKind:
    """Tells what `model` names.

    Raises:
        ConfigError: It looks like a path and there is no such folder.
    """
    if model == SMOLLM2:
        return ModelKind.SMOLLM2
    if model.startswith(DUMMY_PREFIX):
        return ModelKind.DUMMY
    path = Path(model).expanduser()
    if model and path.is_dir():
        return ModelKind.FOLDER
    if model and path.exists():
        raise ConfigError(f"--model {model}: is a file, a folder is needed")
    if not model or model.startswith(("/", ".", "~")) or model.count("/") > 1:
        raise ConfigError(f"--model {model}: no such folder")
    return ModelKind.HUB


def model_folder(model: str) -> Path:
    """Returns a local model's folder after checking that its configuration is there.

    Raises:
        ConfigError: The folder has no config.json.
    """
    folder = Path(model).expanduser()
    if not (folder / "config.json").is_file():
        raise ConfigError(f"--model {model}: no config.json in {folder}")
    return folder


def tokenizer_source(model: str) -> str | None:
    """Returns what `transformers.AutoTokenizer.from_pretrained` takes for a model.

    SmolLM2's tokenizer is there once the engine is ready: the engine converts it.

    Args:
        model: As in ``--model``.

    Returns:
        A folder or a hub id; None if the model has no tokenizer.

    Raises:
        ConfigError: There is no such model, or it has not been converted yet.
    """
    kind = model_kind(model)
    if kind is ModelKind.DUMMY:
        return None
    if kind is ModelKind.SMOLLM2:
        folder = smollm2_folder()
        if not (folder / "tokenizer.json").is_file():
            raise ConfigError(f"--model {model}: its tokenizer is not in {folder} yet")
        return str(folder)
    if kind is ModelKind.FOLDER:
        folder = model_folder(model)
        names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
        return str(folder) if any((folder / name).is_file() for name in names) else None
    return model
