"""What device memory goes to beside the device pool, bounded before any of it is taken.

The pool is allocated before the step's graphs are captured, since they hold its address, so that
what they and the attention workspace will take is reserved by a bound. `log_use` says how it came
out.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import nn

from services.worker.engine.model_loader import LoadedModel

_log = logging.getLogger(__name__)

# FlashInfer's: 512 MiB for partial results, 8 MiB for the plan of each of its wrappers.
_ATTENTION_WORKSPACE_BYTES = 576 << 20
# Kernels' code, cuBLAS's workspace of each stream (32 MiB on Hopper), what allocators round up.
_LIBRARIES_BYTES = 512 << 20
# What CUDA keeps of some fifty captured steps.
_GRAPHS_BYTES = 512 << 20
# Captured steps have at most this many prompt tokens, besides a decode for each sequence.
_CAPTURED_PROMPT_TOKENS = 512
# Logits live in the model's type, as float32 and as log-probabilities, and top-p sorts them.
_BYTES_PER_LOGIT = 48


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """A device's memory once the weights are there.

    Attributes:
        total_bytes: All of it.
        free_bytes: What nobody uses.
        weights_bytes: What the weights use.
        reserve_bytes: Bound on what workspace, activations and graphs will use.
    """

    total_bytes: int
    free_bytes: int
    weights_bytes: int
    reserve_bytes: int


def measure(loaded: LoadedModel, max_step_tokens: int, max_sequences: int) -> DeviceMemory | None:
    """Returns a GPU's memory; None for a CPU.

    Args:
        loaded: The model; on its device.
        max_step_tokens: Most tokens of a step.
        max_sequences: Most sequences of a step.
    """
    if loaded.device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(loaded.device)
    weights = torch.cuda.memory_allocated(loaded.device)
    reserve = reserve_bytes(
        activation_bytes_per_token(loaded.model, loaded.num_layers),
        loaded.vocab_size,
        max_step_tokens,
        max_sequences,
    )
    return DeviceMemory(total, free, weights, reserve)


def activation_bytes_per_token(model: nn.Module, num_layers: int) -> int:
    """Returns a bound on what one token's activations take at any time.

    A weight matrix gives or takes at most as many numbers per token as it has elements for each
    element of the hidden state; so that is what all products of a layer give together. Twice that
    covers what lies in between. One layer runs at a time.

    Args:
        model: With ``config.hidden_size`` and an input embedding.
        num_layers: Its layers, all alike.
    """
    hidden = int(model.config.hidden_size)  # type: ignore[union-attr, arg-type]
    embeddings = {id(model.get_input_embeddings().weight)}  # type: ignore[operator]
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is not None:
        embeddings.add(id(head.weight))
    matrices = [p for p in model.parameters() if p.dim() >= 2 and id(p) not in embeddings]
    elements = sum(p.numel() for p in matrices) // num_layers // hidden
    item_bytes = max((p.element_size() for p in matrices), default=4)
    return 2 * item_bytes * (elements + 2 * hidden)


def reserve_bytes(
    activation_bytes_per_token: int, vocab_size: int, max_step_tokens: int, max_sequences: int
) -> int:
    """Returns the bound on what is used beside weights and pool.

    Args:
        activation_bytes_per_token: As of the function of this name.
        vocab_size: Logits per sequence.
        max_step_tokens: Most tokens of a step that is not captured.
        max_sequences: Most sequences of a step.
    """
    # Captured steps keep their memory, and the others come on top.
    tokens = max_step_tokens + _CAPTURED_PROMPT_TOKENS + max_sequences
    logits = 2 * max_sequences * vocab_size * _BYTES_PER_LOGIT
    fixed = _ATTENTION_WORKSPACE_BYTES + _LIBRARIES_BYTES + _GRAPHS_BYTES
    return fixed + tokens * activation_bytes_per_token + logits


def log_use(memory: DeviceMemory, pool_bytes: int, device: torch.device) -> None:
    """Logs where the memory went, once everything is built.

    Args:
        memory: As it was before the pool was allocated.
        pool_bytes: The pool.
        device: The GPU.
    """
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    used = memory.free_bytes - free - pool_bytes
    gib = 2**30
    _log.info(
        "device memory: weights %.2f GiB, graphs and workspace %.2f (%.2f reserved), pool %.2f,"
        " left %.2f of %.2f",
        memory.weights_bytes / gib,
        used / gib,
        memory.reserve_bytes / gib,
        pool_bytes / gib,
        free / gib,
        memory.total_bytes / gib,
    )
    if used > memory.reserve_bytes:
        _log.warning(
            "graphs and workspace take %.2f GiB more than was reserved: lower"
            " --device-memory-fraction or --device-pool-gib by that much",
            (used - memory.reserve_bytes) / gib,
        )
