"""Batched copies, with a stand-in for cuda-bindings that copies between real addresses."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest
import torch

from services.worker.engine.copies import Run, copy_one_by_one
from services.worker.engine.cuda_copies import BatchCopy, BatchCopyError, bind, choose_copy

STREAM = 7
SUCCESS, INVALID_VALUE = 0, 1
IN_STREAM_ORDER = 1


class FakeRuntime(ModuleType):
    """``cuda.bindings.runtime``: copies at once, and notes the calls.

    Args:
        answer: What a call returns after the error.
    """

    def __init__(self, error: int = SUCCESS, answer: tuple[object, ...] = ()) -> None:
        super().__init__("runtime")
        self.calls: list[int] = []
        self.cudaMemcpyAttributes = SimpleNamespace
        self.cudaMemcpySrcAccessOrder = SimpleNamespace(
            cudaMemcpySrcAccessOrderStream=IN_STREAM_ORDER
        )
        self.cudaMemcpyBatchAsync: Callable[..., tuple[object, ...]] = self._copy
        self._error = error
        self._answer = answer

    def _copy(
        self,
        dsts: list[int],
        srcs: list[int],
        sizes: list[int],
        count: int,
        attrs: list[SimpleNamespace],
        attrs_idxs: list[int],
        num_attrs: int,
        stream: int,
    ) -> tuple[object, ...]:
        assert stream == STREAM
        assert len(dsts) == len(srcs) == len(sizes) == count
        assert (attrs_idxs, num_attrs, len(attrs)) == ([0], 1, 1)
        assert attrs[0].srcAccessOrder == IN_STREAM_ORDER
        self.calls.append(count)
        if self._error == SUCCESS:
            for destination, source, size in zip(dsts, srcs, sizes, strict=True):
                ctypes.memmove(destination, source, size)
        return (self._error, *self._answer)


@pytest.mark.parametrize("answer", [(), (None,)], ids=["CUDA 13", "CUDA 12"])
def test_all_runs_go_down_in_one_call(answer: tuple[object, ...]) -> None:
    runtime = FakeRuntime(answer=answer)
    source, destination = torch.arange(8, dtype=torch.uint8), torch.full((8,), 255).byte()
    copy = BatchCopy(bind(runtime), lambda: STREAM)
    copy(source, destination, (Run(0, 4, 2), Run(6, 0, 1)))
    assert destination.tolist() == [6, 255, 255, 255, 0, 1, 255, 255]
    assert runtime.calls == [2]


@pytest.mark.parametrize("answer", [(), (1,)], ids=["CUDA 13", "CUDA 12"])
def test_a_refusal_is_raised(answer: tuple[object, ...]) -> None:
    copy = BatchCopy(bind(FakeRuntime(INVALID_VALUE, answer)), lambda: STREAM)
    with pytest.raises(BatchCopyError, match="2 copies: 1"):
        copy(torch.zeros(8), torch.zeros(8), (Run(0, 4, 2), Run(6, 0, 1)))


def test_a_runtime_without_batches_is_found_out() -> None:
    with pytest.raises(AttributeError):
        bind(ModuleType("runtime"))


def test_a_cpu_copies_one_by_one() -> None:
    assert choose_copy(torch.device("cpu")) is copy_one_by_one
