# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator"
"""Writes K and V into the pool, one Triton kernel per layer; imported on a GPU only.

The fused path does more in the same kernel: it applies the norms of Q and K, if there are any,
rotates both, and leaves Q where attention reads it.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]

from services.worker.engine.attention.base import RotaryInput

_HEADS_PER_PROGRAM = 8


@triton.jit
def _rotate_and_write_kernel(
    qkv,
    cos,
    sin,
    positions,
    slots,
    query_norm,
    key_norm,
    query,
    pool,
    qkv_stride,
    block_stride,
    value_offset,
    slot_stride,
    epsilon,
    query_heads: tl.constexpr,
    kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    block_size: tl.constexpr,
    heads: tl.constexpr,
    normed: tl.constexpr,
    early: tl.constexpr,
):
    if early:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    half: tl.constexpr = head_dim // 2
    head = tl.program_id(1) * heads + tl.arange(0, heads)
    i = tl.arange(0, half)
    is_query = head < query_heads
    is_value = head >= query_heads + kv_heads
    inside = head < query_heads + 2 * kv_heads
    base = qkv + token * qkv_stride + head[:, None] * head_dim + i[None, :]
    low = tl.load(base, mask=inside[:, None], other=0.0)
    high = tl.load(base + half, mask=inside[:, None], other=0.0)
    dtype = low.dtype
    a, b = low.to(tl.float32), high.to(tl.float32)
    if normed:
        scale = tl.rsqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / head_dim + epsilon)
        q_low = tl.load(query_norm + i).to(tl.float32)
        q_high = tl.load(query_norm + half + i).to(tl.float32)
        k_low = tl.load(key_norm + i).to(tl.float32)
        k_high = tl.load(key_norm + half + i).to(tl.float32)
        low_factor = tl.where(is_query[:, None], q_low[None, :], k_low[None, :])
        high_factor = tl.where(is_query[:, None], q_high[None, :], k_high[None, :])
        a = ((a * scale[:, None]).to(dtype).to(tl.float32) * low_factor).to(dtype).to(tl.float32)
        b = ((b * scale[:, None]).to(dtype).to(tl.float32) * high_factor).to(dtype).to(tl.float32)
    place = tl.load(positions + token)
    c = tl.load(cos + place * half + i)[None, :]
    s = tl.load(sin + place * half + i)[None, :]
    new_low = tl.where(is_value[:, None], low, (a * c - b * s).to(dtype))
    new_high = tl.where(is_value[:, None], high, (b * c + a * s).to(dtype))
    to_query = query + (token * query_heads + head[:, None]) * head_dim + i[None, :]
    tl.store(to_query, new_low, mask=is_query[:, None])
    tl.store(to_query + half, new_high, mask=is_query[:, None])
    slot = tl.load(slots + token)
    kv_head = tl.where(is_value, head - query_heads - kv_heads, head - query_heads)
    row = (slot // block_size) * block_stride + (slot % block_size) * slot_stride
    to_pool = (
        pool
        + row
        + tl.where(is_value, value_offset, 0)[:, None]
        + kv_head[:, None] * head_dim
        + i[None, :]
    )
    # A padding token's slot is negative: it has no place in the pool.
    wanted = (inside & (head >= query_heads) & (slot >= 0))[:, None]
    tl.store(to_pool, new_low, mask=wanted)
    tl.store(to_pool + half, new_high, mask=wanted)


@triton.jit
def _write_kernel(
    key,
    value,
    slots,
    pool,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    block_stride,
    value_offset,
    slot_stride,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
    block_size: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    i = tl.arange(0, padded_dim)
    slot = tl.load(slots + token)
    inside = (i < head_dim) & (slot >= 0)
    row = (slot // block_size) * block_stride + (slot % block_size) * slot_stride + head * head_dim
    k = tl.load(key + token * key_token_stride + head * key_head_stride + i, mask=inside)
    v = tl.load(value + token * value_token_stride + head * value_head_stride + i, mask=inside)
    tl.store(pool + row + i, k, mask=inside)
    tl.store(pool + row + value_offset + i, v, mask=inside)


def rotate_and_write(
    source: RotaryInput,
    slots: torch.Tensor,
    pool: torch.Tensor,
    query: torch.Tensor,
    *,
    early: bool,
) -> None:
    """Rotates Q and K, and writes K and V into one layer of the pool.

    Args:
        source: Q, K and V and how to rotate them.
        slots: int64 ``[T]``, where each token goes: block id * block size + offset; negative:
            nowhere.
        pool: ``[num_blocks, 2, block size, num_kv_heads, head_dim]``, any stride of blocks.
        query: ``[T, num_query_heads, head_dim]``, contiguous; Q is written here.
        early: Start before the kernel before has ended: for devices from Hopper on.
    """
    tokens, query_heads, head_dim = query.shape
    if tokens == 0:
        return
    _, _, block_size, kv_heads, _ = pool.shape
    groups = triton.cdiv(query_heads + 2 * kv_heads, _HEADS_PER_PROGRAM)
    normed = source.query_norm is not None
    _rotate_and_write_kernel[(tokens, groups)](
        source.qkv,
        source.cos,
        source.sin,
        source.positions,
        slots,
        source.query_norm if normed else source.qkv,
        source.key_norm if normed else source.qkv,
        query,
        pool,
        source.qkv.stride(0),
        pool.stride(0),
        pool.stride(1),
        pool.stride(2),
        source.epsilon,
        query_heads=query_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        heads=_HEADS_PER_PROGRAM,
        normed=normed,
        early=early,
        num_warps=4,
        launch_pdl=early,
    )


def write(key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor, pool: torch.Tensor) -> None:
    """Writes K and V into one layer of the pool.

    Args:
        key: ``[T, num_kv_heads, head_dim]``, elements of a head side by side.
        value: As `key`.
        slots: As in `rotate_and_write`.
        pool: As in `rotate_and_write`.
    """
    tokens, kv_heads, head_dim = key.shape
    if tokens == 0:
        return
    _write_kernel[(tokens, kv_heads)](
        key,
        value,
        slots,
        pool,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        pool.stride(0),
        pool.stride(1),
        pool.stride(2),
        head_dim=head_dim,
        padded_dim=triton.next_power_of_2(head_dim),
        block_size=pool.shape[2],
        num_warps=1,
    )
