"""The parts of a Llama layer but attention: on a CPU by torch, on a GPU by Triton kernels.

Both round where transformers' modules round, so that half precision gives what they give.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F

from services.worker.engine.models.few_rows import MOST_ROWS, turned_linear


class FusedOps(Protocol):
    """Parts of a layer; rows are independent of each other."""

    def linear(
        self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Does what `torch.nn.functional.linear` does.

        Args:
            rows: ``[T, in]``, contiguous.
            weight: ``[out, in]``, contiguous.
            bias: ``[out]``, or None.
        """

    def norm(self, rows: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """Divides each row by its root mean square and multiplies it by `weight`.

        Args:
            rows: ``[..., n]``.
            weight: ``[n]``.
            epsilon: Added to the mean square.
        """

    def add_norm(
        self, rows: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the norm of ``rows + residual``, and that sum; either input may be overwritten.

        Args:
            rows: ``[T, n]``.
            residual: ``[T, n]``.
            weight: ``[n]``.
            epsilon: Added to the mean square.
        """

    def silu_multiply(self, gate_up: torch.Tensor) -> torch.Tensor:
        """Returns ``silu(gate) * up``.

        Args:
            gate_up: ``[T, 2 * n]``, gate first.
        """


class TorchOps:
    """See `FusedOps`."""

    def linear(
        self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """See `FusedOps.linear`."""
        few = 0 < rows.shape[0] <= MOST_ROWS
        if few and rows.dtype is torch.float32 and rows.device.type == "cpu":
            return turned_linear(rows, weight, bias)
        return F.linear(rows, weight, bias)

    def norm(self, rows: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """See `FusedOps.norm`."""
        wide = rows.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(epsilon))
        return wide.to(rows.dtype).mul_(weight)

    def add_norm(
        self, rows: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `FusedOps.add_norm`."""
        total = rows.add_(residual)
        return self.norm(total, weight, epsilon), total

    def silu_multiply(self, gate_up: torch.Tensor) -> torch.Tensor:
        """See `FusedOps.silu_multiply`."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)


def fused_ops(device: torch.device) -> FusedOps:
    """Returns the fastest that runs on a device."""
    if device.type == "cuda":
        from services.worker.engine.models.triton_ops import TritonOps

        return TritonOps(device)
    return TorchOps()
