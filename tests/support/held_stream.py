"""Streams that a test holds back, on CUDA and on the threads that stand in for it.

A race is only found for certain if the wrong order happens for certain. So a stream is stopped at
a gate, whatever is wanted ahead of it is run to its end, and then the gate is opened.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Protocol

import torch

from services.worker.engine.streams import Event, Stream, Work

_WAIT_UNTIL_AT_LEAST = 0
"""CU_STREAM_WAIT_VALUE_GEQ."""


class Gate(Protocol):
    """A point that a stream does not pass before it is opened."""

    def bar(self) -> None:
        """The work to launch: what is launched behind it waits for `open`."""

    def open(self) -> None:
        """Lets the stream go on; may be called more than once."""


class ThreadGate:
    """Bars a `CpuStream`."""

    def __init__(self) -> None:
        self._opened = threading.Event()

    def bar(self) -> None:
        """See `Gate.bar`."""
        self._opened.wait()

    def open(self) -> None:
        """See `Gate.open`."""
        self._opened.set()


class CudaGate:
    """Bars a `CudaStream`: the GPU itself waits for a word of pinned host memory.

    Nothing runs meanwhile, so no multiprocessor and no thread of the driver's is taken up. A kernel
    that is used for the first time while a gate is shut may have to be loaded, which can wait for
    the whole device: use it once before.
    """

    def __init__(self) -> None:
        self._word = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        self._driver = ctypes.CDLL("libcuda.so.1")

    def bar(self) -> None:
        """See `Gate.bar`; called with the stream as torch's current one."""
        status = self._driver.cuStreamWaitValue32_v2(
            ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
            ctypes.c_uint64(self._word.data_ptr()),
            ctypes.c_uint32(1),
            ctypes.c_uint(_WAIT_UNTIL_AT_LEAST),
        )
        assert status == 0, f"cuStreamWaitValue32: CUDA error {status}"

    def open(self) -> None:
        """See `Gate.open`."""
        self._word.fill_(1)


class HeldStream:
    """A `Stream` that can be held back; all else it leaves to the real one.

    Args:
        name: For the test that looks for it.
        stream: The real one.
        make_gate: Makes a gate for streams of its kind.
    """

    def __init__(self, name: str, stream: Stream, make_gate: Callable[[], Gate]) -> None:
        self.name = name
        self._stream = stream
        self._make_gate = make_gate
        # Kept until the stream ends, as the GPU may still be reading the word of an open one.
        self._gates: list[Gate] = []
        self._awaited: list[Event] = []

    def launch(self, work: Work) -> None:
        """See `Stream.launch`."""
        self._stream.launch(work)

    def wait(self, event: Event) -> None:
        """See `Stream.wait`."""
        self._awaited.append(event)
        self._stream.wait(event)

    def record(self, *, timed: bool = False) -> Event:
        """See `Stream.record`."""
        return self._stream.record(timed=timed)

    def close(self) -> None:
        """See `Stream.close`; lets go first."""
        self.let_go()
        self._stream.close()

    def hold(self) -> None:
        """Makes everything launched from here on wait for `let_go`."""
        gate = self._make_gate()
        self._gates.append(gate)
        self._stream.launch(gate.bar)

    def let_go(self) -> None:
        """Ends every `hold`."""
        for gate in self._gates:
            gate.open()

    def run_ahead(self) -> None:
        """Blocks until the stream has gone as far as it can while another one is held back.

        That is to the end of what was launched, or to a wait for an event that is not reached.
        """
        end = self._stream.record()
        while not end.query():
            if not all(event.query() for event in self._awaited):
                return
