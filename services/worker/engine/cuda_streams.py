"""`Stream` and `Event` on a GPU."""

from __future__ import annotations

import torch

from services.worker.engine.streams import Event, Work


class CudaEvent:
    """A point in a `CudaStream`."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def query(self) -> bool:
        """See `Event.query`."""
        return bool(self._event.query())

    def synchronize(self) -> None:
        """See `Event.synchronize`."""
        self._event.synchronize()

    def hold_back(self, stream: torch.cuda.Stream) -> None:
        """Makes a stream's later work wait for the event, on the device."""
        stream.wait_event(self._event)


class CudaStream:
    """A CUDA stream."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def launch(self, work: Work) -> None:
        """See `Stream.launch`."""
        with torch.cuda.stream(self._stream):
            work()

    def wait(self, event: Event) -> None:
        """See `Stream.wait`; the event must be a GPU's too."""
        assert isinstance(event, CudaEvent)
        event.hold_back(self._stream)

    def record(self) -> CudaEvent:
        """See `Stream.record`."""
        event = torch.cuda.Event()
        event.record(self._stream)
        return CudaEvent(event)

    def close(self) -> None:
        """See `Stream.close`."""
        self._stream.synchronize()
