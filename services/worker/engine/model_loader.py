"""Loads the model that ``--model`` names, ready for the model runner."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from services.common.errors import ConfigError
from services.common.model_files import ModelKind, model_folder, model_kind
from services.worker.config import EngineConfig
from services.worker.engine.dummy_models import dummy_config, make_model
from services.worker.engine.models.any import ATTENTION_NAME, register_attention
from services.worker.engine.models.supported import check_supported
from services.worker.engine.smollm2 import ensure_smollm2

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
_SAMPLED_BYTES = 65_536

_log = logging.getLogger(__name__)

Report = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model on its device, and what the engine needs to know of it.

    Attributes:
        model: In eval mode, its attention replaced by ours.
        name: As in ``--model``.
        vocab_size: Logits per token; token ids are below it.
        max_context_length: Most tokens in a context.
        eos_token_ids: Tokens that end a generation; empty for random weights.
        num_layers: Layers that keep KV.
        num_query_heads: Heads of Q.
        num_kv_heads: Heads of K and of V.
        head_dim: Elements per head.
        dtype: Element type of weights and KV.
        device: Where the model is.
        fingerprint: Same for the same weights and dtype only; salts the hashes of KV contents.
    """

    model: PreTrainedModel
    name: str
    vocab_size: int
    max_context_length: int
    eos_token_ids: tuple[int, ...]
    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    fingerprint: str


def load(config: EngineConfig, report: Report) -> LoadedModel:
    """Loads the model.

    Args:
        config: Which model, device and dtype.
        report: Told what is being done and the fraction done.

    Raises:
        ConfigError: The model is not there, not supported, or not for this device.
    """
    if config.cpu_threads is not None:
        if config.cpu_threads < 1:
            raise ConfigError(f"--cpu-threads {config.cpu_threads}: at least 1")
        torch.set_num_threads(config.cpu_threads)
    device = _device(config.device)
    transformers_logging.disable_progress_bar()
    register_attention()
    kind = model_kind(config.model)
    if kind is ModelKind.DUMMY:
        return _load_dummy(config, device, report)
    if kind is ModelKind.SMOLLM2:
        source = str(ensure_smollm2(report))
    elif kind is ModelKind.FOLDER:
        source = str(_folder_with_weights(config.model))
    else:
        source = config.model
    return _load_checkpoint(config, source, kind, device, report)


def _load_dummy(config: EngineConfig, device: torch.device, report: Report) -> LoadedModel:
    shape = dummy_config(config.model)
    dtype = _dtype(config.dtype, device, torch.bfloat16)
    limit = _context_limit(config, shape)
    check_supported(shape, config.model, limit)
    report("making random weights", 0.0)
    try:
        model = make_model(shape, dtype, device, config.seed, ATTENTION_NAME)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise _too_large(config) from error
    report("making random weights", 1.0)
    return _loaded(config, model, limit, (), _digest(config.model, str(config.seed), str(device)))


def _load_checkpoint(
    config: EngineConfig, source: str, kind: ModelKind, device: torch.device, report: Report
) -> LoadedModel:
    report("loading weights", 0.0)
    try:
        shape = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model {config.model}: {_reason(error, kind)}") from error
    # Converted to float32, it was bfloat16 in the first place.
    original = torch.bfloat16 if kind is ModelKind.SMOLLM2 else shape.dtype
    dtype = _dtype(config.dtype, device, original or torch.float32)
    limit = _context_limit(config, shape)
    check_supported(shape, config.model, limit)
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            source,
            config=shape,
            dtype=dtype,
            attn_implementation=ATTENTION_NAME,
            output_loading_info=True,
        )
        model = model.to(device).eval()
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise _too_large(config) from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"--model {config.model}: {_reason(error, kind)}") from error
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise ConfigError(
            f"--model {config.model}: lacks {missing[0]} and {len(missing) - 1} other weights"
        )
    report("loading weights", 1.0)
    revision = getattr(shape, "_commit_hash", None) or _folder_digest(Path(source))
    return _loaded(config, model, limit, _eos_token_ids(model), revision)


def _loaded(
    config: EngineConfig,
    model: PreTrainedModel,
    limit: int,
    eos_token_ids: tuple[int, ...],
    revision: str,
) -> LoadedModel:
    shape = model.config
    heads = shape.num_attention_heads
    weight = next(model.parameters())
    return LoadedModel(
        model=model,
        name=config.model,
        vocab_size=shape.vocab_size,
        max_context_length=limit,
        eos_token_ids=eos_token_ids,
        num_layers=shape.num_hidden_layers,
        num_query_heads=heads,
        num_kv_heads=getattr(shape, "num_key_value_heads", None) or heads,
        head_dim=getattr(shape, "head_dim", None) or shape.hidden_size // heads,
        dtype=weight.dtype,
        device=weight.device,
        fingerprint=_digest(revision, str(weight.dtype)),
    )


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in {"cpu", "cuda"}:
        raise ConfigError(f"--device {name}: use cpu, cuda or cuda:<index>")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"--device {name}: no CUDA device, or a torch without CUDA")
        if ":" not in name:
            return torch.device("cuda", torch.cuda.current_device())
        if device.index >= torch.cuda.device_count():
            raise ConfigError(f"--device {name}: there are {torch.cuda.device_count()}")
    return device


def _dtype(name: str, device: torch.device, original: torch.dtype) -> torch.dtype:
    if name == "auto":
        return original if device.type == "cuda" else torch.float32
    if name not in _DTYPES:
        raise ConfigError(f"--dtype {name}: use auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _context_limit(config: EngineConfig, shape: PretrainedConfig) -> int:
    limit: int | None = getattr(shape, "max_position_embeddings", None)
    wanted = config.max_context_length
    if wanted is not None and wanted < 1:
        raise ConfigError(f"--max-context-length {wanted}: at least 1")
    if limit is None:
        if wanted is None:
            raise ConfigError(
                f"--model {config.model}: its configuration names no longest context,"
                " give --max-context-length"
            )
        return wanted
    if wanted is not None and wanted > limit:
        raise ConfigError(f"--max-context-length {wanted}: the model's limit is {limit}")
    return wanted or limit


def _folder_with_weights(model: str) -> Path:
    folder = model_folder(model)
    if not any(any(folder.glob(pattern)) for pattern in _WEIGHT_FILES):
        raise ConfigError(f"--model {model}: no weights ({' or '.join(_WEIGHT_FILES)}) in {folder}")
    return folder


def _eos_token_ids(model: PreTrainedModel) -> tuple[int, ...]:
    generation: GenerationConfig | None = getattr(model, "generation_config", None)
    found = generation.eos_token_id if generation is not None else None
    if found is None:
        found = getattr(model.config, "eos_token_id", None)
    if found is None:
        return ()
    return tuple(found) if isinstance(found, list | tuple) else (int(found),)


def _reason(error: Exception, kind: ModelKind) -> str:
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
    if kind is ModelKind.HUB:
        return f"no such folder, and not to be had from the model hub: {first_line}"
    return first_line


def _too_large(config: EngineConfig) -> ConfigError:
    return ConfigError(f"--model {config.model}: its weights do not fit --device {config.device}")


def _folder_digest(folder: Path) -> str:
    """Returns a digest of a checkpoint: whole configuration, sizes and samples of the weights."""
    digest = hashlib.sha256()
    shape = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    digest.update(json.dumps(shape, sort_keys=True).encode())
    for pattern in _WEIGHT_FILES:
        for path in sorted(folder.glob(pattern)):
            size = path.stat().st_size
            digest.update(f"{path.name}:{size}".encode())
            with path.open("rb") as file:
                for start in range(0, size, max(size // 16, _SAMPLED_BYTES)):
                    file.seek(start)
                    digest.update(file.read(_SAMPLED_BYTES))
    return digest.hexdigest()


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
