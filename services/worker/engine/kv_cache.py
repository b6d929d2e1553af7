"""The device pool: the GPU's half of the KV."""

from __future__ import annotations

import torch

from services.common.errors import ConfigError
from services.worker.engine.kv_layout import KVLayout
from services.worker.engine.streams import Event, Stream


class KVCache:
    """Device memory for `num_blocks` blocks, allocated once.

    Attributes:
        layout: What the bytes mean.
        bytes: uint8, ``[num_blocks * block_bytes]``: what copies see.
        kv: The same memory as `KVLayout.view` gives it: what attention sees.

    Args:
        layout: What the bytes mean.
        num_blocks: Blocks.
        device: Where.

    Raises:
        ConfigError: There is not that much memory.
    """

    def __init__(self, layout: KVLayout, num_blocks: int, device: torch.device) -> None:
        self.layout = layout
        # On a CPU the pages come when they are first written, which takes no time at start.
        allocate = torch.empty if device.type == "cpu" else torch.zeros
        try:
            pool = allocate(num_blocks, layout.block_bytes, dtype=torch.uint8, device=device)
        except (MemoryError, torch.OutOfMemoryError) as error:
            size_gib = num_blocks * layout.block_bytes / 2**30
            raise ConfigError(f"--device-pool-gib {size_gib:.1f}: not to be had") from error
        self.bytes = pool.view(-1)
        self.kv = layout.view(pool)

    def scrub(self, slots: list[int], compute: Stream) -> Event:
        """Fills blocks with NaN behind everything launched on `compute`.

        Whoever reads them without having written them first gets NaN and is found out.
        """
        index = torch.tensor(slots, device=self.kv.device)
        compute.launch(lambda: self._fill(index))
        return compute.record()

    def _fill(self, index: torch.Tensor) -> None:
        self.kv.index_fill_(0, index, float("nan"))
