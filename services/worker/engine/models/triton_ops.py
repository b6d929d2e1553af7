# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator"
"""The element-wise parts of a Llama layer as Triton kernels; imported on a GPU only."""

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]

from services.worker.engine.models import small_products

_WIDE_ROW = 2048
_HOPPER = 9


@triton.jit
def _norm_kernel(
    rows,
    residual,
    weight,
    out,
    row_stride,
    epsilon,
    n: tl.constexpr,
    block: tl.constexpr,
    add: tl.constexpr,
    early: tl.constexpr,
):
    if early:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, block)
    inside = i < n
    x = tl.load(rows + row * row_stride + i, mask=inside, other=0.0)
    dtype = x.dtype
    wide = x.to(tl.float32)
    if add:
        # Rounded before it is squared, as the sum that is kept is.
        total = (wide + tl.load(residual + row * n + i, mask=inside, other=0.0).to(tl.float32)).to(
            dtype
        )
        tl.store(residual + row * n + i, total, mask=inside)
        wide = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / n + epsilon)
    scaled = (wide * scale).to(dtype).to(tl.float32)
    factor = tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * n + i, (scaled * factor).to(dtype), mask=inside)


@triton.jit
def _silu_kernel(gate_up, out, n, block: tl.constexpr, early: tl.constexpr):
    if early:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * block + tl.arange(0, block)
    inside = i < n
    gate = tl.load(gate_up + row * 2 * n + i, mask=inside, other=0.0)
    up = tl.load(gate_up + row * 2 * n + n + i, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    active = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    tl.store(out + row * n + i, (active * up.to(tl.float32)).to(gate.dtype), mask=inside)


class TritonOps:
    """See `FusedOps`.

    From Hopper on, a kernel may be launched before the one before it has ended; it waits for its
    end itself (`gdc_wait`) before it reads or writes what others write or read.

    Args:
        device: Where.
    """

    def __init__(self, device: torch.device) -> None:
        self._early = torch.cuda.get_device_capability(device)[0] >= _HOPPER

    def linear(
        self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """See `FusedOps.linear`."""
        return small_products.linear(rows, weight, bias, early=self._early)

    def norm(self, rows: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """See `FusedOps.norm`."""
        return _norm(rows, None, weight, epsilon, early=self._early)

    def add_norm(
        self, rows: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `FusedOps.add_norm`; `residual` becomes the sum."""
        return _norm(rows, residual, weight, epsilon, early=self._early), residual

    def silu_multiply(self, gate_up: torch.Tensor) -> torch.Tensor:
        """See `FusedOps.silu_multiply`."""
        count, both = gate_up.shape
        n = both // 2
        out = torch.empty(count, n, dtype=gate_up.dtype, device=gate_up.device)
        if count:
            block = 1024
            _silu_kernel[(count, triton.cdiv(n, block))](
                gate_up,
                out,
                n,
                block=block,
                early=self._early,
                num_warps=4,
                launch_pdl=self._early,
            )
        return out


def _norm(
    rows: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    epsilon: float,
    *,
    early: bool,
) -> torch.Tensor:
    n = rows.shape[-1]
    flat = rows.view(-1, n)
    out = torch.empty_like(flat)
    if flat.shape[0]:
        block = triton.next_power_of_2(n)
        _norm_kernel[(flat.shape[0],)](
            flat,
            residual if residual is not None else flat,
            weight,
            out,
            flat.stride(0),
            epsilon,
            n=n,
            block=block,
            add=residual is not None,
            early=early,
            launch_pdl=early,
            num_warps=8 if block > _WIDE_ROW else 4,
        )
    return out.view(rows.shape)
