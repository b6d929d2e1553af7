"""Copies in runs, in order of urgency, after what they must wait for."""

from __future__ import annotations

import pytest
import torch

from services.worker.engine.copies import Run
from services.worker.engine.streams import CpuStream, Wakeup
from services.worker.engine.transfer import CopyJob, Priority, Transfers
from tests.support.manual_stream import ManualStream


def memory(size: int, value: int = 0) -> torch.Tensor:
    return torch.full((size,), value, dtype=torch.uint8)


class Bench:
    """Transfers on hand-driven streams."""

    def __init__(self, ahead_bytes: int = 1 << 20, lot_bytes: int = 1 << 20) -> None:
        wakeup = Wakeup()
        self.load, self.store = ManualStream("load", wakeup), ManualStream("store", wakeup)
        self.compute = ManualStream("compute", wakeup)
        self.transfers = Transfers(self.load, self.store, ahead_bytes, lot_bytes)

    def job(self, value: int, priority: Priority = Priority.WAKE, **fields: object) -> CopyJob:
        return CopyJob(memory(8, value), memory(8), ((Run(0, 0, 8),),), priority, **fields)  # type: ignore[arg-type]


def test_a_job_moves_its_runs_and_nothing_else() -> None:
    bench = Bench()
    source, destination = torch.arange(8, dtype=torch.uint8), memory(8, 255)
    job = CopyJob(source, destination, ((Run(0, 4, 2), Run(6, 0, 1)),), Priority.WAKE)
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
        bench.job(3, Priority.EVICT),
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
    running, first, second = (bench.job(value, Priority.WRITE_THROUGH) for value in range(3))
    for job in (running, first, second):
        bench.transfers.submit(job, to_device=True)
    bench.transfers.hasten(second, Priority.PREFETCH, to_device=True)
    order = []
    for _ in range(3):
        bench.load.run()
        order += bench.transfers.poll()
    assert order == [running, second, first]


def test_a_wake_is_given_to_the_stream_at_once() -> None:
    bench = Bench(ahead_bytes=1)
    running, late, hastened, urgent = (
        bench.job(1, Priority.PREFETCH),
        bench.job(2, Priority.PREFETCH),
        bench.job(3, Priority.PREFETCH),
        bench.job(4, Priority.WAKE),
    )
    for job in (running, late, hastened, urgent):
        bench.transfers.submit(job, to_device=True)
    bench.transfers.hasten(hastened, Priority.WAKE, to_device=True)
    assert [len(job.part_events) for job in (running, late, hastened, urgent)] == [1, 0, 1, 1]
    bench.load.run()
    assert bench.transfers.poll() == [running, urgent, hastened]
    assert bench.transfers.in_flight(to_device=True) == 1


def test_an_urgent_job_overtakes_the_rest_of_one_that_has_begun() -> None:
    bench = Bench(ahead_bytes=1, lot_bytes=3)
    long, urgent = bench.job(5, Priority.PREFETCH), bench.job(6, Priority.WAKE)
    bench.transfers.submit(long, to_device=True)
    bench.load.run()
    assert long.destination.tolist() == [5, 5, 5, 0, 0, 0, 0, 0]
    bench.transfers.submit(urgent, to_device=True)
    assert bench.transfers.poll() == []
    bench.load.run()
    assert bench.transfers.poll() == [urgent]
    assert long.destination.tolist() == [5, 5, 5, 0, 0, 0, 0, 0]
    done = []
    for _ in range(2):
        bench.load.run()
        done += bench.transfers.poll()
    assert done == [long]
    assert long.destination.tolist() == [5] * 8
    assert long.start_ns < urgent.start_ns <= urgent.end_ns <= long.end_ns


def test_each_part_has_an_event_of_its_own() -> None:
    bench = Bench()
    parts = ((Run(0, 0, 2), Run(4, 4, 2)), (Run(2, 2, 2), Run(6, 6, 2)))
    job = CopyJob(memory(8, 9), memory(8), parts, Priority.WAKE)
    bench.transfers.submit(job, to_device=True)
    first, second = job.part_events
    assert bench.load.run(most=1) == 1
    assert (first.query(), second.query()) == (True, False)
    assert job.destination.tolist() == [9, 9, 0, 0, 9, 9, 0, 0]
    assert bench.transfers.poll() == []
    bench.load.run()
    assert second.query()
    assert bench.transfers.poll() == [job]
    assert job.destination.tolist() == [9] * 8
    assert job.size_bytes == 8


def test_a_stream_is_given_no_more_than_is_wanted_ahead() -> None:
    bench = Bench(ahead_bytes=4, lot_bytes=2)
    job = bench.job(1, Priority.EVICT)
    bench.transfers.submit(job, to_device=False)
    given: list[int] = []
    while not given or given[-1]:
        given.append(bench.store.run())
        bench.transfers.poll()
    assert given == [2, 2, 0]


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
    wakeup = Wakeup()
    load, store = CpuStream("load", wakeup), CpuStream("store", wakeup)
    transfers = Transfers(load, store)
    job = CopyJob(memory(4), memory(8), ((Run(0, 0, 8),),), Priority.WAKE)
    transfers.submit(job, to_device=to_device)
    load.close()
    store.close()
    with pytest.raises(RuntimeError):
        transfers.poll()
