"""Pools and limits, from what was asked for and what there is."""

from __future__ import annotations

import pytest
import torch

from services.common.errors import ConfigError
from services.worker.config import EngineConfig
from services.worker.engine.device_memory import DeviceMemory
from services.worker.engine.kv_layout import KVLayout
from services.worker.engine.sizing import (
    Sizes,
    choose_block_size,
    choose_sizes,
    choose_step_tokens,
)

LAYOUT = KVLayout(4, 16, 2, 32, torch.float32)
CPU = torch.device("cpu")
MIB = 2**-10


def config(**fields: object) -> EngineConfig:
    return EngineConfig(model="dummy:tiny", **fields)  # type: ignore[arg-type]


def sizes_of(
    wanted: EngineConfig, model_limit: int = 4096, memory: DeviceMemory | None = None
) -> Sizes:
    return choose_sizes(wanted, LAYOUT, model_limit, choose_step_tokens(wanted, CPU), memory)


def test_a_block_is_about_8_mib_on_a_gpu() -> None:
    llama2 = KVLayout(32, 1, 32, 128, torch.bfloat16).token_bytes
    llama3 = KVLayout(32, 1, 8, 128, torch.bfloat16).token_bytes
    assert choose_block_size(config(device="cuda"), llama2) == 16
    assert choose_block_size(config(device="cuda"), llama3) == 64
    assert choose_block_size(config(device="cpu"), llama3) == 16
    assert choose_block_size(config(block_size_tokens=5), llama3) == 5


def test_the_pools_hold_whole_blocks() -> None:
    sizes = sizes_of(config(device_pool_gib=4 * MIB, host_pool_gib=8 * MIB))
    assert (sizes.device_blocks, sizes.host_blocks) == (128, 256)
    assert sizes.max_context_length == 128 * 16
    assert sizes.max_step_tokens == 256


def test_no_host_pool_is_a_choice() -> None:
    sizes = sizes_of(config(device_pool_gib=4 * MIB, host_pool_gib=0), 100)
    assert (sizes.host_blocks, sizes.max_context_length) == (0, 100)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"device_pool_gib": 0}, "--device-pool-gib 0: above 0"),
        ({"device_pool_gib": -1.0}, "--device-pool-gib -1.0: above 0"),
        ({"device_pool_gib": 0.03 * MIB}, "--device-pool-gib: 0 tokens fit"),
        ({"device_pool_gib": MIB, "max_context_length": 4096}, "--device-pool-gib: 512 tokens fit"),
        ({"host_pool_gib": MIB, "max_context_length": 4096}, "--host-pool-gib: 512 tokens fit"),
        ({"host_pool_gib": -1.0}, "--host-pool-gib -1.0: at least 0"),
        ({"max_context_length": 5000}, "--max-context-length 5000: 2 to 4096"),
        ({"max_step_tokens": 8, "max_running_sequences": 9}, "--max-step-tokens 8"),
        ({"max_running_sequences": 0}, "--max-running-sequences 0"),
    ],
)
def test_what_cannot_be_is_refused_by_name(fields: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        sizes_of(config(**fields))
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


GIB = 1 << 30
GPU = DeviceMemory(
    total_bytes=80 * GIB, free_bytes=65 * GIB, weights_bytes=14 * GIB, reserve_bytes=3 * GIB
)


@pytest.mark.parametrize(("fraction", "pool_gib"), [(1.0, 62), (0.9, 54), (0.5, 22)])
def test_the_share_of_the_device_holds_with_all_that_is_to_come(
    fraction: float, pool_gib: int
) -> None:
    sizes = sizes_of(config(device_memory_fraction=fraction, host_pool_gib=0), memory=GPU)
    assert sizes.device_blocks * LAYOUT.block_bytes == pool_gib * GIB
    used = GPU.total_bytes - GPU.free_bytes + GPU.reserve_bytes + pool_gib * GIB
    assert used == fraction * GPU.total_bytes


def test_a_pool_is_as_large_as_was_said() -> None:
    sizes = sizes_of(config(device_pool_gib=62, host_pool_gib=0), memory=GPU)
    assert sizes.device_blocks * LAYOUT.block_bytes == 62 * GIB


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"device_pool_gib": 62.5}, "--device-pool-gib 62.5: 62.0 GiB are left"),
        ({"device_memory_fraction": 0.2}, "--device-pool-gib: 0 tokens fit"),
        ({"device_memory_fraction": 1.1}, "--device-memory-fraction 1.1: above 0, at most 1"),
    ],
)
def test_what_a_gpu_has_no_room_for_is_refused(fields: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        sizes_of(config(**fields), memory=GPU)
    assert told in str(caught.value)


def test_a_layout_s_view_shares_the_pool() -> None:
    flat = torch.zeros(3, LAYOUT.block_bytes, dtype=torch.uint8)
    kv = LAYOUT.view(flat)
    assert kv.shape == (3, 4, 2, 16, 2, 32)
    kv[1] = 1.0
    assert flat[0].sum() == flat[2].sum() == 0
    assert flat[1].any()
