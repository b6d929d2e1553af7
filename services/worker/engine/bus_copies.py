# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator"
"""Small copies between pinned host memory and the device by a kernel; imported on a GPU only.

A copy engine serves its direction's copies one after another, whatever stream they are in: a step's
few KB of inputs would wait until all the KV queued before them, hundreds of MB, has crossed. A
kernel reads and writes pinned memory over the bus itself (unified addressing: the host's address is
the device's too), beside the copy engines.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]

_ELEMENTS_PER_PROGRAM = 1024


# The count differs at each step, and a kernel of its own for round ones would be built in service.
@triton.jit(do_not_specialize=["count"])
def _copy_kernel(source, target, count, block: tl.constexpr):
    i = tl.program_id(0) * block + tl.arange(0, block)
    inside = i < count
    tl.store(target + i, tl.load(source + i, mask=inside), mask=inside)


def copy(source: torch.Tensor, target: torch.Tensor) -> None:
    """Queues a copy on the current stream.

    torch's allocator of pinned memory does not know of it: whoever owns the host's side keeps it,
    and keeps from writing to it, until the stream has come past.

    Args:
        source: Contiguous, on the device or in pinned memory.
        target: Contiguous, the other of the two; as many elements of the same dtype.
    """
    count = source.numel()
    assert source.dtype == target.dtype
    assert count == target.numel()
    if count:
        programs = triton.cdiv(count, _ELEMENTS_PER_PROGRAM)
        _copy_kernel[(programs,)](source, target, count, block=_ELEMENTS_PER_PROGRAM)
