# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator"
"""Products of few rows as Triton kernels; imported on a GPU only.

A decode step of few sequences is bound by reading the weights. These kernels read them nearer to
the memory's speed than the library does, and start to while the kernel before them still runs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]

_MOST_ROWS = 32
_DOT_ROWS = 16


@triton.jit
def _row_kernel(
    x,
    weight,
    bias,
    out,
    n,
    k: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    biased: tl.constexpr,
    early: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * block_n + tl.arange(0, block_n)
    i = tl.arange(0, block_k)
    start = weight + rows[:, None] * k + i[None, :]
    inside = (rows < n)[:, None]
    # Weights are there whatever the kernel before does.
    tile = tl.load(start, mask=inside & (i < k)[None, :], other=0.0, eviction_policy="evict_first")
    if early:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    total = tl.zeros([block_n, block_k], tl.float32)
    for offset in range(0, k, block_k):
        following = offset + block_k
        after = tl.load(
            start + following,
            mask=inside & (following + i < k)[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        part = tl.load(x + offset + i, mask=offset + i < k, other=0.0).to(tl.float32)
        total += tile.to(tl.float32) * part[None, :]
        tile = after
    result = tl.sum(total, axis=1)
    if biased:
        result += tl.load(bias + rows, mask=rows < n, other=0.0).to(tl.float32)
    tl.store(out + rows, result.to(out.dtype.element_ty), mask=rows < n)


@triton.jit
def _rows_kernel(
    x,
    weight,
    bias,
    out,
    m,
    n,
    k: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    stages: tl.constexpr,
    biased: tl.constexpr,
    early: tl.constexpr,
):
    columns = tl.program_id(0).to(tl.int64) * block_n + tl.arange(0, block_n)
    rows = tl.arange(0, block_m)
    i = tl.arange(0, block_k)
    left = weight + columns[:, None] * k + i[None, :]
    right = x + rows[None, :] * k + i[:, None]
    inside = (rows < m)[None, :]
    total = tl.zeros([block_n, block_m], tl.float32)
    if early:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for offset in tl.range(0, k, block_k, num_stages=stages):
        tile = tl.load(left + offset, eviction_policy="evict_first")
        part = tl.load(right + offset, mask=inside, other=0.0)
        total = tl.dot(tile, part, total)
    if biased:
        total += tl.load(bias + columns).to(tl.float32)[:, None]
    tl.store(
        out + rows[None, :] * n + columns[:, None], total.to(out.dtype.element_ty), mask=inside
    )


def linear(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, early: bool
) -> torch.Tensor:
    """Does what `torch.nn.functional.linear` does.

    Args:
        rows: ``[T, in]``, contiguous.
        weight: ``[out, in]``, contiguous.
        bias: ``[out]``, or None.
        early: Start before the kernel before has ended: for devices from Hopper on.
    """
    count, k = rows.shape
    n = weight.shape[0]
    if not 0 < count <= _MOST_ROWS or rows.element_size() != 2:
        return F.linear(rows, weight, bias)
    biased = bias is not None
    if count == 1:
        wide = k % 2048 == 0
        out = torch.empty(count, n, dtype=rows.dtype, device=rows.device)
        _row_kernel[(triton.cdiv(n, 4),)](
            rows,
            weight,
            bias if biased else weight,
            out,
            n,
            k=k,
            block_n=4,
            block_k=2048 if wide else 1024,
            biased=biased,
            early=early,
            num_warps=8 if wide else 4,
            launch_pdl=early,
        )
        return out
    if n <= 8192:
        block_n, block_k, stages, warps = 32, 256, 4, 4
    elif n <= 16384:
        block_n, block_k, stages, warps = 64, 128, 4, 4
    else:
        block_n, block_k, stages, warps = 64, 128, 3, 8
    # Long and narrow, a product of many rows wants its depth split, as the library does.
    narrow = count > _DOT_ROWS and k > n
    if narrow or n % block_n or k % block_k:
        return F.linear(rows, weight, bias)
    out = torch.empty(count, n, dtype=rows.dtype, device=rows.device)
    _rows_kernel[(n // block_n,)](
        rows,
        weight,
        bias if biased else weight,
        out,
        count,
        n,
        k=k,
        block_m=_DOT_ROWS if count <= _DOT_ROWS else _MOST_ROWS,
        block_n=block_n,
        block_k=block_k,
        stages=stages,
        biased=biased,
        early=early,
        num_warps=warps,
        num_stages=stages,
        launch_pdl=early,
    )
    return out
