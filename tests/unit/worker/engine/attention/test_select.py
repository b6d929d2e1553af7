"""Choosing an attention backend."""

from __future__ import annotations

import pytest
import torch

from services.common.errors import ConfigError
from services.worker.engine.attention import AttentionSpec, select_backend
from services.worker.engine.attention.flashinfer import why_not
from services.worker.engine.kv_layout import KVLayout
from tests.support.model_driver import nan_pool

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def spec_of(device: torch.device, dtype: torch.dtype, head_dim: int) -> AttentionSpec:
    return AttentionSpec(KVLayout(1, 8, 2, head_dim, dtype), 4, device)


@pytest.mark.parametrize("name", ["auto", "sdpa"])
def test_sdpa_runs_everywhere(name: str) -> None:
    spec = spec_of(CPU, torch.float32, 8)
    backend = select_backend(name)(spec, spec.layout.view(nan_pool(spec.layout, 2)))
    assert backend.name == "sdpa"


def test_flashinfer_says_what_it_lacks() -> None:
    spec = spec_of(CPU, torch.bfloat16, 128)
    with pytest.raises(ConfigError, match="--attention flashinfer: needs a CUDA device"):
        select_backend("flashinfer")(spec, torch.empty(0))
    assert why_not(spec_of(CUDA, torch.float32, 128)) == (
        "needs bfloat16 or float16, and not float32"
    )
    assert why_not(spec_of(CUDA, torch.bfloat16, 8)) == "has no kernels for heads of 8 elements"


def test_an_unknown_name_is_told_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"--attention eager: unknown, use one of auto, .*sdpa"):
        select_backend("eager")
