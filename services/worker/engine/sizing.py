"""How many blocks the pools get, and how long a context may be: decided once, at start."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from services.common.errors import ConfigError
from services.worker.config import EngineConfig
from services.worker.engine.device_memory import DeviceMemory
from services.worker.engine.kv_layout import KVLayout

_log = logging.getLogger(__name__)

_CPU_DEVICE_POOL_GIB = 1.0
_BLOCK_BYTES_WANTED = 8 << 20


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the engine is given.

    Attributes:
        device_blocks: Blocks of the device pool.
        host_blocks: Blocks of the host pool.
        max_context_length: Most tokens in a context: what the model, the user and the pools allow.
        max_step_tokens: Most tokens in a step.
    """

    device_blocks: int
    host_blocks: int
    max_context_length: int
    max_step_tokens: int


def choose_block_size(config: EngineConfig, token_bytes: int) -> int:
    """Returns the tokens per block.

    Unless it is given: 16 on a CPU, and on a GPU the power of two from 16 to 256 at which a block
    is about 8 MiB, so that scattered block copies run near the wire's speed.
    """
    if config.block_size_tokens < 0:
        raise ConfigError(f"--block-size {config.block_size_tokens}: at least 1, or 0 to choose")
    if config.block_size_tokens:
        return config.block_size_tokens
    if config.device == "cpu":
        return 16
    size = 16
    while size < 256 and size * 2 * token_bytes <= _BLOCK_BYTES_WANTED:
        size *= 2
    return size


def choose_sizes(
    config: EngineConfig,
    layout: KVLayout,
    model_limit: int,
    max_step_tokens: int,
    memory: DeviceMemory | None,
) -> Sizes:
    """Returns the pools' sizes.

    Args:
        config: What the user asked for.
        layout: Of a block.
        model_limit: Most tokens that the model takes.
        max_step_tokens: As of `choose_step_tokens`.
        memory: The GPU's, with the weights on it; None: there is none.

    Raises:
        ConfigError: A pool cannot hold one sequence, or a value is out of range.
    """
    device_blocks = _device_pool_bytes(config, memory) // layout.block_bytes
    if config.host_pool_gib < 0:
        raise ConfigError(f"--host-pool-gib {config.host_pool_gib}: at least 0")
    host_blocks = int(config.host_pool_gib * 2**30) // layout.block_bytes
    limit = model_limit
    if config.max_context_length is not None:
        if not 1 < config.max_context_length <= model_limit:
            raise ConfigError(
                f"--max-context-length {config.max_context_length}: 2 to {model_limit}, "
                "the model's limit"
            )
        limit = config.max_context_length
    fits = limit
    for flag, blocks, off in (
        ("--device-pool-gib", device_blocks, False),
        ("--host-pool-gib", host_blocks, config.host_pool_gib == 0),
    ):
        if off:
            continue
        tokens = blocks * layout.block_size_tokens
        if tokens < limit and (config.max_context_length is not None or blocks < 2):
            needed = -(-limit // layout.block_size_tokens) * layout.block_bytes
            raise ConfigError(
                f"{flag}: {tokens} tokens fit, but one sequence of {limit} needs "
                f"{needed / 2**30:.3f} GiB; give it that, or lower --max-context-length"
            )
        fits = min(fits, tokens)
    if fits < limit:
        _log.warning("contexts are limited to %d tokens, which the smaller pool holds", fits)
    return Sizes(device_blocks, host_blocks, fits, max_step_tokens)


def choose_step_tokens(config: EngineConfig, device: torch.device) -> int:
    """Returns the most tokens of a step.

    Raises:
        ConfigError: Each sequence of a step cannot decode in it, or there may be none.
    """
    if config.max_running_sequences < 1:
        raise ConfigError(f"--max-running-sequences {config.max_running_sequences}: at least 1")
    tokens = config.max_step_tokens or (256 if device.type == "cpu" else 2048)
    if tokens < config.max_running_sequences:
        raise ConfigError(
            f"--max-step-tokens {tokens}: at least --max-running-sequences, "
            f"{config.max_running_sequences}, since each may decode"
        )
    return tokens


def _device_pool_bytes(config: EngineConfig, memory: DeviceMemory | None) -> int:
    wanted = config.device_pool_gib
    if wanted is not None and wanted <= 0:
        raise ConfigError(f"--device-pool-gib {wanted}: above 0")
    if memory is None:
        return int((_CPU_DEVICE_POOL_GIB if wanted is None else wanted) * 2**30)
    room = memory.free_bytes - memory.reserve_bytes
    if wanted is not None:
        if int(wanted * 2**30) > room:
            raise ConfigError(
                f"--device-pool-gib {wanted}: {max(room, 0) / 2**30:.1f} GiB are left beside the"
                f" weights and {memory.reserve_bytes / 2**30:.1f} GiB for graphs and workspace"
            )
        return int(wanted * 2**30)
    if not 0 < config.device_memory_fraction <= 1:
        raise ConfigError(
            f"--device-memory-fraction {config.device_memory_fraction}: above 0, at most 1"
        )
    return max(0, room - int((1 - config.device_memory_fraction) * memory.total_bytes))
