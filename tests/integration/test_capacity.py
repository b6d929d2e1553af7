"""Twice what both pools hold: everybody is served, and nothing grows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from services.worker.config import EngineConfig
from tests.support.built_engine import BuiltEngine
from tests.support.overload import Overload
from tests.support.small_llama import kv_layout, write_small_llama

LAYOUT = kv_layout(16, torch.float32)
DEVICE_BLOCKS, HOST_BLOCKS = 24, 32


@pytest.mark.parametrize("write_through", [True, False])
def test_twice_the_capacity_of_both_pools_is_served(tmp_path: Path, write_through: bool) -> None:
    engine = BuiltEngine(
        EngineConfig(
            model=write_small_llama(tmp_path),
            block_size_tokens=LAYOUT.block_size_tokens,
            device_pool_gib=DEVICE_BLOCKS * LAYOUT.block_bytes / 2**30,
            host_pool_gib=HOST_BLOCKS * LAYOUT.block_bytes / 2**30,
            max_context_length=128,
            max_running_sequences=8,
            write_through=write_through,
        )
    )
    assert (engine.ready.device_blocks, engine.ready.host_blocks) == (DEVICE_BLOCKS, HOST_BLOCKS)
    load = Overload(engine, times=2, context_tokens=96, rounds=3, new_tokens=4)
    fullest = {"device": 0, "host": 0}

    def watch() -> None:
        report = engine.engine.report()
        for name, pool in (("device", report.device), ("host", report.host)):
            assert pool.free + pool.used + pool.reclaimable + pool.in_flight == pool.total
            fullest[name] = max(fullest[name], pool.total - pool.free)
        assert (report.device.total, report.host.total) == (DEVICE_BLOCKS, HOST_BLOCKS)

    made = load.run(watch)
    counters = engine.engine.report().counters
    engine.close()
    assert set(made.values()) == {3 * 4}
    assert len(made) == load.agents == 19
    assert fullest == {"device": DEVICE_BLOCKS, "host": HOST_BLOCKS}
    # Both tiers ran over: some were evicted and came back, some were recomputed from their tokens.
    assert min(counters.evictions, counters.loads, counters.drops) > 0
    assert counters.recomputed_tokens > 0
    assert counters.requests_completed == 3 * load.agents
    assert counters.requests_failed == 0
