"""Runs: made of blocks, divided, split and copied."""

from __future__ import annotations

import pytest
import torch

from services.worker.engine.copies import Run, coalesce, copy_one_by_one, divide, split


def test_adjoining_blocks_become_one_run() -> None:
    assert coalesce([(2, 7), (0, 5), (1, 6), (4, 8)], 10) == (Run(0, 50, 30), Run(40, 80, 10))


def test_blocks_that_adjoin_on_one_side_only_stay_apart() -> None:
    assert coalesce([(0, 5), (1, 4)], 10) == (Run(0, 50, 10), Run(10, 40, 10))


def test_no_run_crosses_a_seam() -> None:
    pairs = [(block, block + 2) for block in range(6)]
    whole = (Run(0, 20, 60),)
    assert coalesce(pairs, 10) == coalesce(pairs, 10, source_seam=6) == whole
    assert coalesce(pairs, 10, source_seam=4) == (Run(0, 20, 40), Run(40, 60, 20))
    assert coalesce(pairs, 10, destination_seam=4) == (Run(0, 20, 20), Run(20, 40, 40))


def test_each_group_has_its_share_of_every_block() -> None:
    runs = (Run(0, 20, 20), Run(50, 0, 10))
    assert divide(runs, 10, 1) == (runs,)
    assert divide(runs, 10, 2) == (
        (Run(0, 20, 5), Run(10, 30, 5), Run(50, 0, 5)),
        (Run(5, 25, 5), Run(15, 35, 5), Run(55, 5, 5)),
    )


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_groups_together_copy_every_byte_once(groups: int) -> None:
    source = torch.randint(0, 255, (80,), dtype=torch.uint8)
    destination, times = torch.zeros_like(source), torch.zeros(80, dtype=torch.int64)
    for runs in divide((Run(0, 40, 24), Run(24, 8, 32)), 8, groups):
        copy_one_by_one(source, destination, runs)
        for run in runs:
            times[run.destination : run.destination + run.size_bytes] += 1
    assert torch.equal(destination[40:64], source[:24])
    assert torch.equal(destination[8:40], source[24:56])
    assert times.tolist() == [0] * 8 + [1] * 56 + [0] * 16


@pytest.mark.parametrize("most_bytes", [1, 7, 12, 20, 100])
def test_lots_are_full_and_lose_nothing(most_bytes: int) -> None:
    runs = (Run(0, 5, 12), Run(30, 17, 1), Run(40, 50, 7))
    lots = split(runs, most_bytes)
    sizes = [sum(run.size_bytes for run in lot) for lot in lots]
    assert sizes[:-1] == [most_bytes] * (len(lots) - 1)
    assert 0 < sizes[-1] <= most_bytes
    assert sum(sizes) == 20
    moved = [
        (run.source + byte, run.destination + byte)
        for lot in lots
        for run in lot
        for byte in range(run.size_bytes)
    ]
    assert moved == [
        (run.source + byte, run.destination + byte)
        for run in runs
        for byte in range(run.size_bytes)
    ]
