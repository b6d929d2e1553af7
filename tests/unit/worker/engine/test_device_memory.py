"""The bound on what a GPU's memory goes to beside weights and pool."""

from __future__ import annotations

import pytest
import torch

from services.worker.config import EngineConfig
from services.worker.engine.device_memory import (
    activation_bytes_per_token,
    measure,
    reserve_bytes,
)
from services.worker.engine.model_loader import LoadedModel, load


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return load(EngineConfig(model="dummy:tiny"), lambda _what, _done: None)


def test_a_layer_s_products_give_no_more_than_the_bound(tiny: LoadedModel) -> None:
    tokens = torch.arange(10)[None]
    given: list[int] = []
    handles = [
        module.register_forward_hook(lambda _module, _args, out: given.append(out.numel()))
        for module in tiny.model.model.layers[0].modules()
        if isinstance(module, torch.nn.Linear)
    ]
    tiny.model.set_attn_implementation("sdpa")
    with torch.inference_mode():
        tiny.model(tokens)
    for handle in handles:
        handle.remove()
    assert len(given) == 7
    bound = activation_bytes_per_token(tiny.model, tiny.num_layers)
    assert 10 * bound >= 2 * 4 * sum(given) > 10 * bound // 4


def test_more_of_anything_takes_more(tiny: LoadedModel) -> None:
    least = reserve_bytes(1000, 32_000, 2048, 64)
    assert least > 1 << 30
    assert reserve_bytes(1001, 32_000, 2048, 64) - least == 2048 + 512 + 64
    assert reserve_bytes(1000, 32_000, 2049, 64) - least == 1000
    assert reserve_bytes(1000, 32_000, 2048, 65) > least
    assert reserve_bytes(1000, 64_000, 2048, 64) > least


def test_a_cpu_has_no_memory_of_its_own(tiny: LoadedModel) -> None:
    assert measure(tiny, 256, 64) is None
