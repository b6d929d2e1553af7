"""`Stream` and `Event` on a GPU."""

from __future__ import annotations

import time

import torch

from services.worker.engine.streams import Event, Work

_ANCHOR_LASTS_NS = 10_000_000_000


class DeviceClock:
    """Says at which time of the wall clock a GPU reached an event.

    CUDA tells only the time between two events, as a float32 of milliseconds, so that both clocks
    are compared anew every ten seconds: that keeps the rounding within a microsecond.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._compare()

    def wall_ns(self, event: torch.cuda.Event) -> int:
        """Returns when an event was reached; it has been, and was made with timing."""
        since_ms: float = self._anchor.elapsed_time(event)
        reached_ns = self._anchor_ns + round(since_ms * 1e6)
        if time.time_ns() - self._anchor_ns > _ANCHOR_LASTS_NS:
            self._compare()
        return reached_ns

    def _compare(self) -> None:
        # Nothing else is on this stream, so that the event is reached at once.
        anchor = torch.cuda.Event(enable_timing=True)
        before_ns = time.time_ns()
        anchor.record(self._stream)
        anchor.synchronize()
        self._anchor, self._anchor_ns = anchor, (before_ns + time.time_ns()) // 2


class CudaEvent:
    """A point in a `CudaStream`."""

    def __init__(self, event: torch.cuda.Event, clock: DeviceClock) -> None:
        self._event = event
        self._clock = clock

    def query(self) -> bool:
        """See `Event.query`."""
        return bool(self._event.query())

    def synchronize(self) -> None:
        """See `Event.synchronize`."""
        self._event.synchronize()

    def reached_ns(self) -> int:
        """See `Event.reached_ns`."""
        return self._clock.wall_ns(self._event)

    def hold_back(self, stream: torch.cuda.Stream) -> None:
        """Makes a stream's later work wait for the event, on the device."""
        stream.wait_event(self._event)


class CudaStream:
    """A CUDA stream."""

    def __init__(self, device: torch.device, clock: DeviceClock | None = None) -> None:
        self._stream = torch.cuda.Stream(device)
        self._clock = clock or DeviceClock(device)

    def launch(self, work: Work) -> None:
        """See `Stream.launch`."""
        with torch.cuda.stream(self._stream):
            work()

    def wait(self, event: Event) -> None:
        """See `Stream.wait`; the event must be a GPU's too."""
        assert isinstance(event, CudaEvent)
        event.hold_back(self._stream)

    def record(self, *, timed: bool = False) -> CudaEvent:
        """See `Stream.record`."""
        event = torch.cuda.Event(enable_timing=timed)
        event.record(self._stream)
        return CudaEvent(event, self._clock)

    def close(self) -> None:
        """See `Stream.close`."""
        self._stream.synchronize()
