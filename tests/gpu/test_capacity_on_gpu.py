"""Twice what both pools hold, on a GPU: everybody is served, and no memory is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from services.worker.config import EngineConfig
from services.worker.engine.device_memory import measure
from services.worker.engine.model_loader import load
from tests.support.built_engine import BuiltEngine
from tests.support.overload import Overload
from tests.support.small_llama import kv_layout, write_small_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

LAYOUT = kv_layout(16, torch.bfloat16)
DEVICE_BLOCKS, HOST_BLOCKS = 256, 512


def config(model: str, **fields: object) -> EngineConfig:
    return EngineConfig(
        model=model,
        device="cuda",
        dtype="bfloat16",
        block_size_tokens=LAYOUT.block_size_tokens,
        max_context_length=1024,
        **fields,  # type: ignore[arg-type]
    )


def alloc_retries() -> int:
    """Returns how often the allocator ran out and had to free what it kept."""
    return int(torch.cuda.memory_stats()["num_alloc_retries"])


def test_twice_the_capacity_of_both_pools_is_served_from_what_is_there(tmp_path: Path) -> None:
    engine = BuiltEngine(
        config(
            write_small_llama(tmp_path),
            device_pool_gib=DEVICE_BLOCKS * LAYOUT.block_bytes / 2**30,
            host_pool_gib=HOST_BLOCKS * LAYOUT.block_bytes / 2**30,
        )
    )
    load_all = Overload(engine, times=2, context_tokens=768, rounds=4, new_tokens=8)
    torch.cuda.reset_peak_memory_stats()
    before, retries_before = torch.cuda.memory_allocated(), alloc_retries()
    most = 0

    def watch() -> None:
        nonlocal most
        most = max(most, torch.cuda.memory_allocated())

    made = load_all.run(watch)
    engine.settle()
    counters = engine.engine.report().counters
    after, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    retries = alloc_retries() - retries_before
    engine.close()
    assert set(made.values()) == {4 * 8}
    assert min(counters.evictions, counters.loads, counters.drops) > 0
    assert counters.requests_failed == 0
    # What a step needs comes and goes; nothing is kept from one to the next.
    assert retries == 0
    assert after - before < 8 << 20
    assert most - before < 64 << 20
    assert peak - before < 256 << 20


@pytest.mark.parametrize("fraction", [0.3, 0.6])
def test_the_share_of_the_device_holds_once_everything_is_built(
    tmp_path: Path, fraction: float
) -> None:
    model = write_small_llama(tmp_path)
    wanted = config(model, device_memory_fraction=fraction, host_pool_gib=0.0)
    torch.cuda.empty_cache()
    memory = measure(load(wanted, lambda _what, _done: None), 2048, 64)
    assert memory is not None
    engine = BuiltEngine(wanted)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    engine.close()
    pool_bytes = engine.ready.device_blocks * engine.ready.block_bytes
    assert total - free <= fraction * total
    assert memory.free_bytes - free - pool_bytes <= memory.reserve_bytes
    # All but what was reserved and not needed is the pool's.
    assert total - free > fraction * total - memory.reserve_bytes - engine.ready.block_bytes
