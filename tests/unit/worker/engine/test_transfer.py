"""Copies in runs, in order of urgency, after what they must wait for."""

from __future__ import annotations

import pytest
import torch

from services.worker.engine.streams import Wakeup
from services.worker.engine.transfer import CopyJob, Priority, Run, Transfers, coalesce
from tests.support.manual_stream import ManualStream


def memory(size: int, value: int = 0) -> torch.Tensor:
    return torch.full((size,), value, dtype=torch.uint8)


class Bench:
    """Transfers on hand-driven streams."""

    def __init__(self, ahead_bytes: int = 1 << 20) -> None:
        wakeup = Wakeup()
        self.load, self.store = ManualStream("load", wakeup), ManualStream("store", wakeup)
        self.compute = ManualStream("compute", wakeup)
        self.transfers = Transfers(self.load, self.store, ahead_bytes)

    def job(self, value: int, priority: Priority = Priority.WAKE, **fields: object) -> CopyJob:
        return CopyJob(memory(8, value), memory(8), (Run(0, 0, 8),), priority, **fields)  # type: ignore[arg-type]


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


def test_a_job_moves_its_runs_and_nothing_else() -> None:
    bench = Bench()
    source, destination = torch.arange(8, dtype=torch.uint8), memory(8, 255)
    job = CopyJob(source, destination, (Run(0, 4, 2), Run(6, 0, 1)), Priority.WAKE)
    bench.transfers.submit(job, to_device=True)
    assert bench.transfers.poll() == []
    bench.load.run()
    assert bench.transfers.poll() == [job]
    assert destination.tolist() == [6, 255, 255, 255, 0, 1, 255, 255]
    assert job.size_bytes == 3
    assert 0 < job.start_ns <= job.end_ns


def test_an_urgent_job_overtakes_what_was_not_given_to_the_stream() -> None:
    bench = Bench(ahead_bytes=1)
    running, late, urgent = (
        bench.job(1, Priority.WRITE_THROUGH),
        bench.job(2, Priority.WRITE_THROUGH),
        bench.job(3, Priority.WAKE),
    )
    for job in (running, late, urgent):
        bench.transfers.submit(job, to_device=True)
    order = []
    for _ in range(3):
        bench.load.run()
        order += bench.transfers.poll()
    assert order == [running, urgent, late]


def test_a_hastened_job_overtakes() -> None:
    bench = Bench(ahead_bytes=1)
    running, first, second = (bench.job(value, Priority.PREFETCH) for value in range(3))
    for job in (running, first, second):
        bench.transfers.submit(job, to_device=True)
    bench.transfers.hasten(second, Priority.WAKE, to_device=True)
    order = []
    for _ in range(3):
        bench.load.run()
        order += bench.transfers.poll()
    assert order == [running, second, first]


def test_a_job_waits_for_its_events() -> None:
    bench = Bench()
    fence = bench.compute.record()
    job = bench.job(1, after=(fence,))
    bench.transfers.submit(job, to_device=False)
    bench.store.run()
    assert bench.transfers.poll() == []
    bench.compute.run()
    bench.store.run()
    assert bench.transfers.poll() == [job]


def test_the_directions_do_not_wait_for_each_other() -> None:
    bench = Bench()
    bench.transfers.submit(bench.job(1), to_device=True)
    out = bench.job(2)
    bench.transfers.submit(out, to_device=False)
    bench.store.run()
    assert bench.transfers.poll() == [out]
    assert bench.transfers.in_flight(to_device=True) == 1
    assert bench.transfers.in_flight(to_device=False) == 0


@pytest.mark.parametrize("to_device", [True, False])
def test_a_failed_copy_is_raised(to_device: bool) -> None:
    from services.worker.engine.streams import CpuStream

    wakeup = Wakeup()
    load, store = CpuStream("load", wakeup), CpuStream("store", wakeup)
    transfers = Transfers(load, store)
    job = CopyJob(memory(4), memory(8), (Run(0, 0, 8),), Priority.WAKE)
    transfers.submit(job, to_device=to_device)
    load.close()
    store.close()
    with pytest.raises(RuntimeError):
        transfers.poll()
