"""What the model runner asks of a model's forward pass."""

from __future__ import annotations

from typing import Protocol

import torch

from services.worker.engine.attention import AttentionBackend, Plan


class StepModel(Protocol):
    """A decoder that computes the flat row of tokens of one step.

    An implementation over transformers' modules runs any architecture; others may be faster for
    some.
    """

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        rows: torch.Tensor,
        attention: AttentionBackend,
        plan: Plan,
    ) -> torch.Tensor:
        """Computes all tokens and the logits of some.

        Args:
            token_ids: int64 ``[T]``.
            positions: int64 ``[T]``, position of each token in its sequence.
            rows: int64 ``[n]``, which tokens' logits are wanted, possibly none.
            attention: Writes K and V and attends, layer by layer.
            plan: `attention`'s plan for this step.

        Returns:
            ``[n, vocab_size]`` in the model's dtype.
        """
