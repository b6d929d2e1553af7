"""Copies between pinned memory and a real GPU: every byte, in batches and in groups of layers."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import pytest
import torch

from services.worker.engine.copies import Copy, Run, copy_one_by_one, divide
from services.worker.engine.cuda_copies import BatchCopy, choose_copy
from services.worker.engine.cuda_streams import CudaStream
from services.worker.engine.host_pool import CudaPinning, HostPool
from services.worker.engine.transfer import CopyJob, Priority, Transfers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(120),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

BLOCK = 1 << 20
BLOCKS = 40
CUDA = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def host() -> Iterator[torch.Tensor]:
    pool = HostPool(BLOCKS, BLOCK, pinning=CudaPinning())
    yield pool.bytes
    pool.close()


def blocks(seed: int) -> tuple[Run, ...]:
    rng = random.Random(seed)
    pairs = zip(rng.sample(range(BLOCKS), 24), rng.sample(range(BLOCKS), 24), strict=True)
    return tuple(Run(source * BLOCK, destination * BLOCK, BLOCK) for source, destination in pairs)


def finish(transfers: Transfers, count: int) -> list[CopyJob]:
    done: list[CopyJob] = []
    while len(done) < count:
        done += transfers.poll()
    return done


def test_cuda_bindings_are_there_and_batch() -> None:
    assert isinstance(choose_copy(CUDA), BatchCopy)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("one_by_one", [False, True])
def test_a_store_and_a_load_bring_every_byte_back(
    host: torch.Tensor, groups: int, one_by_one: bool
) -> None:
    copy: Copy = copy_one_by_one if one_by_one else choose_copy(CUDA)
    transfers = Transfers(CudaStream(CUDA), CudaStream(CUDA), 8 << 20, 3 << 20, copy)
    original = torch.randint(0, 255, (BLOCKS * BLOCK,), dtype=torch.uint8, device=CUDA)
    restored = torch.zeros_like(original)
    host.fill_(0)
    torch.cuda.synchronize()
    out = blocks(groups)
    back = tuple(Run(run.destination, run.source, run.size_bytes) for run in out)
    began_ns = time.time_ns()
    store = CopyJob(original, host, divide(out, BLOCK, groups), Priority.EVICT)
    transfers.submit(store, to_device=False)
    assert finish(transfers, 1) == [store]
    load = CopyJob(host, restored, divide(back, BLOCK, groups), Priority.WAKE)
    transfers.submit(load, to_device=True)
    assert len(load.part_events) == groups
    assert finish(transfers, 1) == [load]
    wanted = torch.zeros_like(original)
    for run in out:
        span = slice(run.source, run.source + run.size_bytes)
        wanted[span] = original[span]
    assert torch.equal(restored, wanted)
    # The device's clock is told from the wall's by some tens of microseconds at most.
    slack_ns = 1_000_000
    assert began_ns - slack_ns < store.start_ns < store.end_ns < load.end_ns
    assert load.start_ns < load.end_ns < time.time_ns() + slack_ns


def test_compute_that_waits_for_a_group_sees_all_of_it(host: torch.Tensor) -> None:
    """Each group's event is waited for on another stream, which then reads that group."""
    groups = 4
    transfers = Transfers(CudaStream(CUDA), CudaStream(CUDA), copy=choose_copy(CUDA))
    compute = CudaStream(CUDA)
    host.fill_(7)
    device = torch.zeros(BLOCKS * BLOCK, dtype=torch.uint8, device=CUDA)
    torch.cuda.synchronize()
    whole = (Run(0, 0, BLOCKS * BLOCK),)
    job = CopyJob(host, device, divide(whole, BLOCK, groups), Priority.WAKE)
    transfers.submit(job, to_device=True)
    by_group = device.view(BLOCKS, groups, BLOCK // groups)
    sums: list[torch.Tensor] = []
    for group, event in enumerate(job.part_events):
        compute.wait(event)
        compute.launch(lambda group=group: sums.append(by_group[:, group].sum()))  # type: ignore[misc]
    compute.record().synchronize()
    assert [int(total) for total in sums] == [7 * BLOCKS * BLOCK // groups] * groups
    assert finish(transfers, 1) == [job]


def test_a_wake_overtakes_a_long_prefetch(host: torch.Tensor) -> None:
    transfers = Transfers(
        CudaStream(CUDA), CudaStream(CUDA), ahead_bytes=1, lot_bytes=BLOCK, copy=choose_copy(CUDA)
    )
    device = torch.zeros(BLOCKS * BLOCK, dtype=torch.uint8, device=CUDA)
    half = BLOCKS * BLOCK // 2
    prefetch = CopyJob(host, device, ((Run(0, 0, half),),), Priority.PREFETCH)
    wake = CopyJob(host, device, ((Run(half, half, half),),), Priority.WAKE)
    transfers.submit(prefetch, to_device=True)
    transfers.submit(wake, to_device=True)
    assert finish(transfers, 2) == [wake, prefetch]
    assert prefetch.start_ns < wake.start_ns < wake.end_ns < prefetch.end_ns
