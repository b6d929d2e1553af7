"""Which bytes a copy moves: runs, how they are made of blocks, divided, and copied.

A run is one contiguous piece of memory on both sides; a copy of few large runs is as fast as the
wire, one of many small runs is not unless they are submitted together (`cuda_copies`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class Run:
    """Adjoining bytes.

    Attributes:
        source: First byte in the source.
        destination: First byte in the destination.
        size_bytes: How many.
    """

    source: int
    destination: int
    size_bytes: int

    def piece(self, start: int, size_bytes: int) -> Run:
        """Returns `size_bytes` of it from its byte `start` on."""
        return Run(self.source + start, self.destination + start, size_bytes)


Runs = tuple[Run, ...]


class Copy(Protocol):
    """Copies bytes from one flat memory to another."""

    def __call__(
        self, source: torch.Tensor, destination: torch.Tensor, runs: Sequence[Run]
    ) -> None:
        """Copies all runs; on a GPU queues them on the current stream.

        Args:
            source: uint8, one dimension.
            destination: uint8, one dimension; overlaps the source nowhere.
            runs: No two write the same byte; at least one.
        """


def copy_one_by_one(source: torch.Tensor, destination: torch.Tensor, runs: Sequence[Run]) -> None:
    """Copies each run by a call of its own; see `Copy`."""
    for run in runs:
        destination[run.destination : run.destination + run.size_bytes].copy_(
            source[run.source : run.source + run.size_bytes], non_blocking=True
        )


def coalesce(
    pairs: Iterable[tuple[int, int]],
    block_bytes: int,
    *,
    source_seam: int | None = None,
    destination_seam: int | None = None,
) -> Runs:
    """Returns block copies as runs, adjoining blocks joined.

    Args:
        pairs: (source block, destination block); no destination twice.
        block_bytes: Bytes of a block on both sides.
        source_seam: No run crosses a multiple of this many blocks of the source: a copy whose host
            memory was pinned in two pieces is refused by the CUDA driver. None: no seams.
        destination_seam: The same of the destination.
    """
    # (source block, destination block, blocks) of each run.
    runs: list[tuple[int, int, int]] = []
    source, destination, count = -1, -1, 0
    for next_source, next_destination in sorted(pairs):
        if (
            next_source == source + count
            and next_destination == destination + count
            and (source_seam is None or next_source % source_seam)
            and (destination_seam is None or next_destination % destination_seam)
        ):
            count += 1
            continue
        if count:
            runs.append((source, destination, count))
        source, destination, count = next_source, next_destination, 1
    if count:
        runs.append((source, destination, count))
    return tuple(Run(s * block_bytes, d * block_bytes, n * block_bytes) for s, d, n in runs)


def divide(runs: Runs, block_bytes: int, groups: int) -> tuple[Runs, ...]:
    """Returns runs of whole blocks as `groups` parts, each with its share of every block.

    A block's bytes are in order of the layers, so that part g is the KV of one group of adjoining
    layers, the first group first.

    Args:
        runs: Each is whole blocks.
        block_bytes: Bytes of a block; a multiple of `groups`.
        groups: At least 1; with 1 the runs are left as they are.
    """
    if groups == 1:
        return (runs,)
    share = block_bytes // groups
    assert share * groups == block_bytes
    return tuple(
        tuple(
            run.piece(start + group * share, share)
            for run in runs
            for start in range(0, run.size_bytes, block_bytes)
        )
        for group in range(groups)
    )


def split(runs: Runs, most_bytes: int) -> list[Runs]:
    """Returns runs as consecutive lots of `most_bytes` each; the last may be smaller."""
    lots: list[Runs] = []
    lot: list[Run] = []
    room = most_bytes
    for run in runs:
        start = 0
        while start < run.size_bytes:
            size = min(room, run.size_bytes - start)
            lot.append(run.piece(start, size))
            start += size
            room -= size
            if room == 0:
                lots.append(tuple(lot))
                lot, room = [], most_bytes
    if lot:
        lots.append(tuple(lot))
    return lots


def total_bytes(runs: Iterable[Run]) -> int:
    """Returns the bytes of all runs."""
    return sum(run.size_bytes for run in runs)
