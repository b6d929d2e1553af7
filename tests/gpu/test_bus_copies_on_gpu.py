"""Copies by a kernel between pinned memory and the device."""

from __future__ import annotations

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(120),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

CUDA = torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32])
@pytest.mark.parametrize("count", [0, 1, 1023, 1024, 1025, 100_000])
def test_there_and_back(count: int, dtype: torch.dtype) -> None:
    from services.worker.engine import bus_copies

    source = torch.randint(-(2**31), 2**31 - 1, (count,)).to(dtype).pin_memory()
    there = torch.full((count,), -7, dtype=dtype, device=CUDA)
    back = torch.full((count,), -9, dtype=dtype, pin_memory=True)
    bus_copies.copy(source, there)
    bus_copies.copy(there, back)
    torch.cuda.synchronize()
    assert torch.equal(there.cpu(), source)
    assert torch.equal(back, source)


def test_only_what_is_asked_for_is_written() -> None:
    from services.worker.engine import bus_copies

    target = torch.full((2000,), -7, dtype=torch.int32, device=CUDA)
    bus_copies.copy(torch.arange(1500, dtype=torch.int32).pin_memory(), target[100:1600])
    assert target[:100].eq(-7).all()
    assert target[1600:].eq(-7).all()
    assert torch.equal(target[100:1600].cpu(), torch.arange(1500, dtype=torch.int32))


def test_it_overtakes_what_the_copy_engines_have_to_do() -> None:
    from services.worker.engine import bus_copies

    host = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(1 << 30, dtype=torch.uint8, device=CUDA)
    small = torch.arange(1000).pin_memory()
    there = torch.empty(1000, dtype=torch.int64, device=CUDA)
    back = torch.empty(1000, dtype=torch.int64, pin_memory=True)
    bus_copies.copy(small, there)  # builds the kernel
    torch.cuda.synchronize()
    loads, stores = torch.cuda.Stream(), torch.cuda.Stream()
    for _ in range(4):  # 80 ms of copies in each direction, to different halves
        with torch.cuda.stream(loads):
            device[: 1 << 29].copy_(host[: 1 << 29], non_blocking=True)
        with torch.cuda.stream(stores):
            host[1 << 29 :].copy_(device[1 << 29 :], non_blocking=True)
    bus_copies.copy(small, there)
    bus_copies.copy(there, back)
    torch.cuda.current_stream().synchronize()
    assert torch.equal(back, small)
    assert not loads.query()
    assert not stores.query()
    torch.cuda.synchronize()
