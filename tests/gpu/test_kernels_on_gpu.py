"""The Triton kernels of the fused forward pass, each against float64, on outputs full of NaN."""

from __future__ import annotations

import math

import pytest
import torch

from services.worker.engine.attention.base import RotaryInput
from services.worker.engine.models.fused_ops import fused_ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

CUDA = torch.device("cuda")
# Of the norm of the difference, over that of the result.
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE))


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *size, **kind: empty(*size, **kind).fill_(math.nan))
    monkeypatch.setattr(
        torch, "empty_like", lambda like, **kind: empty_like(like, **kind).fill_(math.nan)
    )


def random(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(size, device=CUDA).to(dtype)


def assert_like(made: torch.Tensor, expected: torch.Tensor) -> None:
    assert made.shape == expected.shape
    error = (made.double() - expected).norm() / expected.norm()
    assert float(error) < TOLERANCE[made.dtype]


def exact_norm(rows: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    wide = rows.double()
    return wide / (wide.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight.double()


@DTYPES
@pytest.mark.parametrize(("count", "n"), [(1, 256), (33, 4096), (130, 576), (0, 64)])
def test_norms(count: int, n: int, dtype: torch.dtype) -> None:
    ops = fused_ops(CUDA)
    rows, residual = random(count, n, dtype=dtype), random(count, n, dtype=dtype)
    weight = random(n, dtype=dtype)
    made = ops.norm(rows, weight, 1e-5)
    added, kept = ops.add_norm(rows.clone(), residual.clone(), weight, 1e-5)
    if count == 0:
        assert made.shape == added.shape == kept.shape == rows.shape
        return
    total = rows.double() + residual.double()
    assert_like(made, exact_norm(rows, weight, 1e-5))
    assert_like(added, exact_norm(total, weight, 1e-5))
    assert_like(kept, total)


@DTYPES
@pytest.mark.parametrize(("count", "n"), [(1, 384), (32, 11_008), (140, 1000)])
def test_activation(count: int, n: int, dtype: torch.dtype) -> None:
    both = random(count, 2 * n, dtype=dtype)
    gate, up = both.double().chunk(2, dim=-1)
    assert_like(fused_ops(CUDA).silu_multiply(both), gate * gate.sigmoid() * up)


@DTYPES
@pytest.mark.parametrize("count", [1, 2, 16, 17, 32, 64])
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (1000, 576), (22_016, 1024), (640, 11_008)])
@pytest.mark.parametrize("biased", [False, True])
def test_products(count: int, n: int, k: int, biased: bool, dtype: torch.dtype) -> None:
    rows, weight = random(count, k, dtype=dtype), random(n, k, dtype=dtype)
    bias = random(n, dtype=dtype) if biased else None
    expected = rows.double() @ weight.double().t()
    if bias is not None:
        expected += bias.double()
    assert_like(fused_ops(CUDA).linear(rows, weight, bias), expected)


@DTYPES
@pytest.mark.parametrize(("query_heads", "kv_heads", "head_dim"), [(32, 8, 128), (3, 3, 64)])
@pytest.mark.parametrize("normed", [False, True])
def test_rotation_and_writing(
    query_heads: int, kv_heads: int, head_dim: int, normed: bool, dtype: torch.dtype
) -> None:
    from services.worker.engine.models import kv_write

    tokens, size = 37, 16
    heads = query_heads + 2 * kv_heads
    qkv = random(tokens, heads * head_dim, dtype=dtype)
    angles = torch.rand(64, head_dim // 2, device=CUDA) * 6
    positions = torch.randint(64, (tokens,), device=CUDA)
    query_norm, key_norm = (
        (random(head_dim, dtype=dtype), random(head_dim, dtype=dtype)) if normed else (None, None)
    )
    # Two layers of a pool of NaN; every other slot of each block, in scrambled order.
    pool = torch.full((8, 2, 2, size, kv_heads, head_dim), math.nan, dtype=dtype, device=CUDA)
    slots = torch.randperm(8 * size, device=CUDA)[:tokens]
    slots[5] = -1
    query = torch.empty((tokens, query_heads, head_dim), dtype=dtype, device=CUDA)
    source = RotaryInput(qkv, angles.cos(), angles.sin(), positions, query_norm, key_norm, 1e-6)
    early = torch.cuda.get_device_capability()[0] >= 9
    kv_write.rotate_and_write(source, slots, pool[:, 1], query, early=early)

    exact = qkv.double().view(tokens, heads, head_dim)
    turned, value = exact.split((query_heads + kv_heads, kv_heads), dim=1)
    if query_norm is not None and key_norm is not None:
        first, second = turned.split((query_heads, kv_heads), dim=1)
        turned = torch.cat(
            (exact_norm(first, query_norm, 1e-6), exact_norm(second, key_norm, 1e-6)), dim=1
        )
    low, high = turned.chunk(2, dim=-1)
    cos, sin = (
        angles[positions][:, None].double().cos(),
        angles[positions][:, None].double().sin(),
    )
    turned = torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)
    assert_like(query, turned[:, :query_heads])
    written = slots[slots >= 0]
    kept = slots >= 0
    token_major = pool[:, 1].transpose(0, 1).flatten(1, 2)
    assert_like(token_major[0, written], turned[kept, query_heads:])
    assert torch.equal(token_major[1, written].double(), value[kept])
    assert bool(pool[:, 0].isnan().all())
    assert int(token_major.isnan().all(-1).all(-1).sum()) == 2 * (8 * size - int(kept.sum()))
