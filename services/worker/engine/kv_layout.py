"""How the bytes of a block are KV.

A pool is flat, ``[num_blocks, block_bytes]`` of uint8, on the device and on the host alike; block
ids, copies and checksums know nothing else. `KVLayout` is the one place that knows what the bytes
mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Multi-head or grouped-query KV of all layers, block-major.

    Attributes:
        num_layers: Layers that keep KV.
        block_size_tokens: Tokens per block.
        num_kv_heads: Heads of K and of V.
        head_dim: Elements per head.
        dtype: Element type.
    """

    num_layers: int
    block_size_tokens: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's KV in all layers."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return self.token_bytes * self.block_size_tokens

    def view(self, pool: torch.Tensor) -> torch.Tensor:
        """Returns a pool as KV, sharing its memory.

        Args:
            pool: uint8, ``[num_blocks, block_bytes]``, contiguous.

        Returns:
            `dtype`, ``[num_blocks, num_layers, 2, block_size_tokens, num_kv_heads, head_dim]``;
            K is 0 and V is 1 in the third place.
        """
        return pool.view(self.dtype).view(
            pool.shape[0],
            self.num_layers,
            2,
            self.block_size_tokens,
            self.num_kv_heads,
            self.head_dim,
        )
