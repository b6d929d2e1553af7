"""The least time that a step or a copy can take.

That is what a model must read, multiply and move, at the speed that the machine has.
A step reads every weight but the embedding's once, and the KV of all tokens in its contexts; it
multiplies each new token with every weight (two operations each; the last layer's logits are
computed for one token of each sequence only), and attends to all tokens before it. Its floor is
the larger of the two times. `bench floors` measures the speeds and writes the file read here.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.initialization import no_init_weights

from services.common.errors import ConfigError
from services.common.model_files import ModelKind, model_kind, smollm2_folder
from services.worker.config import EngineConfig
from services.worker.engine.dummy_models import dummy_config
from services.worker.engine.kv_layout import KVLayout
from services.worker.engine.sizing import choose_block_size

Part = tuple[int, int]
"""One sequence in a step: tokens computed before, and tokens that the step computes."""


@dataclass(frozen=True, slots=True)
class Speeds:
    """What the machine does at best.

    Attributes:
        memory_bytes_per_s: Device memory, bytes read plus bytes written of a large copy.
        product_flops: Floating-point operations per second of a large product.
        load_bytes_per_s: One large copy from pinned host memory to the device.
        store_bytes_per_s: One large copy the other way.
    """

    memory_bytes_per_s: float
    product_flops: float
    load_bytes_per_s: float
    store_bytes_per_s: float


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a step computes.

    Attributes:
        name: For the table.
        sequences: How many.
        context: Tokens of each that were computed before.
        new: Tokens of each that the step computes. 0: the last sequence computes the first 256
            tokens of a prompt (or `context`, if that is less), and all others decode.
    """

    name: str
    sequences: int
    context: int
    new: int

    def parts(self) -> list[Part]:
        """Returns the sequences."""
        if self.new:
            return [(self.context, self.new)] * self.sequences
        decodes = [(self.context, 1)] * (self.sequences - 1)
        return [*decodes, (0, min(256, self.context))]


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What of a model decides how long its steps and copies take at least.

    Attributes:
        name: As in ``--model``.
        dtype: Element type of weights and KV.
        parameters_read: Weights that every step reads.
        head_parameters: Of these, the ones that make logits.
        layers: That keep KV.
        query_heads: Heads of Q.
        kv_heads: Heads of K and of V.
        head_dim: Elements per head.
        vocab_size: Token ids are below it.
    """

    name: str
    dtype: torch.dtype
    parameters_read: int
    head_parameters: int
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's KV."""
        return self.layout(1).token_bytes

    def layout(self, block_size_tokens: int) -> KVLayout:
        """Returns the layout of blocks of this many tokens."""
        return KVLayout(
            self.layers, block_size_tokens, self.kv_heads, self.head_dim, dtype=self.dtype
        )

    def chosen_layout(self, device: str) -> KVLayout:
        """Returns the layout that the worker chooses on ``cpu`` or ``cuda``."""
        config = EngineConfig(model=self.name, device=device.partition(":")[0])
        return self.layout(choose_block_size(config, self.token_bytes))


def model_shape(model: str, device: str, dtype: str = "auto") -> ModelShape:
    """Returns a model's shape, without its weights.

    Args:
        model: As in ``--model``.
        device: ``cpu``, ``cuda`` or ``cuda:<index>``.
        dtype: As torch names it, or ``auto``: bfloat16 on a GPU, float32 on a CPU.

    Raises:
        ConfigError: There is no such model or type.
    """
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    element = getattr(torch, dtype, None)
    if not isinstance(element, torch.dtype):
        raise ConfigError(f"--dtype {dtype}: no element type")
    config = _model_config(model)
    with torch.device("meta"), no_init_weights():
        meta = AutoModelForCausalLM.from_config(config, dtype=element)
    embedding = meta.get_input_embeddings().weight
    tied = bool(config.tie_word_embeddings)
    parameters = sum(weight.numel() for weight in meta.parameters())
    query_heads = config.num_attention_heads
    return ModelShape(
        name=model,
        dtype=element,
        parameters_read=parameters - (0 if tied else embedding.numel()),
        head_parameters=embedding.numel(),
        layers=config.num_hidden_layers,
        query_heads=query_heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or query_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // query_heads,
        vocab_size=config.vocab_size,
    )


def _model_config(model: str) -> PretrainedConfig:
    kind = model_kind(model)
    if kind is ModelKind.DUMMY:
        return dummy_config(model)
    source = str(smollm2_folder()) if kind is ModelKind.SMOLLM2 else model
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model {model}: {str(error).splitlines()[0]}") from error


def default_steps(batches: Sequence[int], context: int) -> list[StepShape]:
    """Returns the steps that are measured and bounded.

    Args:
        batches: Of the decodes; at least one.
        context: Tokens before each decode.
    """
    shapes = [StepShape(f"decode {count}", count, context, 1) for count in batches]
    known = max(context - 26, 1)
    shapes += [StepShape(f"append 32 to {known} x{count}", count, known, 32) for count in (1, 8)]
    prompt = min(context, 1024)
    shapes += [StepShape(f"prefill {prompt} x{count}", count, 0, prompt) for count in (1, 4)]
    decodes = max(batches) // 2
    if decodes:
        shapes.append(StepShape(f"decode {decodes} + 256 of a prompt", decodes + 1, context, 0))
    return shapes


def step_bytes(model: ModelShape, parts: Sequence[Part]) -> int:
    """Returns the bytes that a step must read: weights, and the KV of its contexts."""
    tokens = sum(start + new for start, new in parts)
    return model.parameters_read * model.dtype.itemsize + tokens * model.token_bytes


def step_flops(model: ModelShape, parts: Sequence[Part]) -> float:
    """Returns the floating-point operations of a step."""
    flops = 0.0
    for start, new in parts:
        pairs = new * start + new * (new + 1) / 2
        flops += 2.0 * (model.parameters_read - model.head_parameters) * new
        flops += 2.0 * model.head_parameters
        flops += 4.0 * model.query_heads * model.head_dim * pairs * model.layers
    return flops


def step_floor_s(model: ModelShape, parts: Sequence[Part], speeds: Speeds) -> float:
    """Returns the least time that a step takes."""
    return max(
        step_bytes(model, parts) / speeds.memory_bytes_per_s,
        step_flops(model, parts) / speeds.product_flops,
    )


def restore_floor_s(model: ModelShape, tokens: int, speeds: Speeds) -> float:
    """Returns the least time in which the KV of `tokens` tokens comes back from the host."""
    return tokens * model.token_bytes / speeds.load_bytes_per_s


# --- the file --------------------------------------------------------------------------------


def add_floors_flags(parser: argparse.ArgumentParser) -> None:
    """Adds ``--floors``, and what overrides a figure of it."""
    parser.add_argument(
        "--floors",
        type=Path,
        metavar="FILE",
        help="the machine's speeds, as `bench floors --json` wrote them; else they are measured",
    )
    parser.add_argument("--bandwidth-tb-s", type=float, help="device memory, instead of that")
    parser.add_argument("--tflops", type=float, help="of products, instead of that")


def chosen_speeds(args: argparse.Namespace, measure: Callable[[], Speeds]) -> Speeds:
    """Returns the speeds that the flags of `add_floors_flags` ask for.

    Args:
        args: The parsed flags.
        measure: Called if no file is given.

    Raises:
        ConfigError: The file is not a result of `bench floors`.
    """
    speeds = measure() if args.floors is None else read_speeds(args.floors)
    if args.bandwidth_tb_s is not None:
        speeds = replace(speeds, memory_bytes_per_s=args.bandwidth_tb_s * 1e12)
    if args.tflops is not None:
        speeds = replace(speeds, product_flops=args.tflops * 1e12)
    return speeds


def measured_apart(model: str, device: str) -> Speeds:
    """Measures the speeds in a process of its own, which leaves the device to who comes after it.

    Raises:
        ConfigError: They could not be measured.
    """
    with tempfile.TemporaryDirectory(prefix="djinn-bench-") as folder:
        result = Path(folder) / "floors.json"
        line = [sys.executable, "-m", "bench", "floors", f"--model={model}", f"--device={device}"]
        try:
            subprocess.run([*line, f"--json={result}"], stdout=subprocess.DEVNULL, check=True)
        except subprocess.CalledProcessError as error:
            raise ConfigError(f"--device {device}: its speeds could not be measured") from error
        return read_speeds(result)


def read_speeds(path: Path) -> Speeds:
    """Reads the speeds out of a file of `bench floors`.

    Raises:
        ConfigError: It is not one.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return Speeds(**{name: float(value) for name, value in found["speeds"].items()})
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"--floors {path}: not a result of `bench floors` ({error})") from None
