"""Times: the run's clock, waiting until something is due, and how late the event loop runs."""

from __future__ import annotations

import asyncio
import ctypes
import os
import resource
import time
from collections.abc import AsyncIterator, Sequence

from loadgen.metrics import quantile
from loadgen.record import LoopLag
from loadgen.workload import AgentPlan


class RunClock:
    """Seconds since the run's start, on the clock that all processes of a machine share.

    Args:
        start_ns: The start, as `time.monotonic_ns` tells it; may lie ahead.
    """

    def __init__(self, start_ns: int) -> None:
        self._start_ns = start_ns

    def now(self) -> float:
        return round((time.monotonic_ns() - self._start_ns) * 1e-9, 6)

    async def sleep_until(self, due_s: float) -> None:
        """Returns once `due_s` has come; at once if it has passed."""
        left = due_s - self.now()
        if left > 0:
            await asyncio.sleep(left)


async def due_agents(plans: Sequence[AgentPlan], clock: RunClock) -> AsyncIterator[AgentPlan]:
    """Yields each agent when it is due, in order of arrival.

    The schedule is open-loop: what earlier agents do never delays a later one, and an agent that is
    yielded late keeps its scheduled time, from which its latency counts.
    """
    for plan in sorted(plans, key=lambda p: p.arrival_s):
        await clock.sleep_until(plan.arrival_s)
        yield plan


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))

    @classmethod
    def of(cls, nanoseconds: int) -> _Timespec:
        return cls(*divmod(nanoseconds, 1_000_000_000))


class _TimerSpec(ctypes.Structure):
    _fields_ = (("interval", _Timespec), ("value", _Timespec))


_CLOCK_MONOTONIC = 1
_TFD_NONBLOCK = 0o4000
_TFD_CLOEXEC = 0o2000000
_TFD_TIMER_ABSTIME = 1


def _open_timer(first_ns: int, interval_ns: int) -> int:
    """Returns a file descriptor that becomes readable at regular times."""
    libc = ctypes.CDLL(None, use_errno=True)
    timer: int = libc.timerfd_create(_CLOCK_MONOTONIC, _TFD_NONBLOCK | _TFD_CLOEXEC)
    if timer < 0:
        raise OSError(ctypes.get_errno(), "timerfd_create failed")
    spec = _TimerSpec(_Timespec.of(interval_ns), _Timespec.of(first_ns))
    if libc.timerfd_settime(timer, _TFD_TIMER_ABSTIME, ctypes.byref(spec), None) != 0:
        os.close(timer)
        raise OSError(ctypes.get_errno(), "timerfd_settime failed")
    return timer


def _preemptions() -> int:
    """Returns how often the kernel has interrupted this thread in favour of another."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw


class LagProbe:
    """Measures how late an event loop runs what is due.

    The kernel makes a file descriptor readable at regular times; a sample is how long after that
    time the loop got round to it, just as it would have to a token. The loop's own timers would not
    do: they are rounded up to the next millisecond.

    Args:
        process: Number of the client process, for the report.
        interval_s: Time between samples.
    """

    def __init__(self, process: int, interval_s: float = 0.01) -> None:
        self._process = process
        self._interval_ns = round(interval_s * 1e9)
        self._due_ns = 0
        self._lags_ns: list[int] = []
        self._timer: int | None = None
        self._preemptions_before = 0
        self._preemptions = 0

    def start(self) -> None:
        """Begins to measure the running loop."""
        self._due_ns = time.monotonic_ns() + self._interval_ns
        self._timer = _open_timer(self._due_ns, self._interval_ns)
        self._preemptions_before = _preemptions()
        asyncio.get_running_loop().add_reader(self._timer, self._sample)

    def stop(self) -> LoopLag:
        """Stops measuring and returns what was measured."""
        if self._timer is not None:
            asyncio.get_running_loop().remove_reader(self._timer)
            os.close(self._timer)
            self._timer = None
            self._preemptions = _preemptions() - self._preemptions_before
        return self.summary()

    def summary(self) -> LoopLag:
        """Returns what has been measured until now; zeros if nothing has."""
        ordered = [ns * 1e-6 for ns in sorted(self._lags_ns)]
        if not ordered:
            return LoopLag(self._process, 0, 0.0, 0.0, 0.0)
        return LoopLag(
            self._process,
            len(ordered),
            quantile(ordered, 0.50),
            quantile(ordered, 0.99),
            ordered[-1],
            self._preemptions,
        )

    def _sample(self) -> None:
        if self._timer is None:
            return
        now_ns = time.monotonic_ns()
        # Times that passed while the loop was busy are samples too, each with its own lateness.
        expirations = int.from_bytes(os.read(self._timer, 8), "little")
        for _ in range(expirations):
            self._lags_ns.append(max(0, now_ns - self._due_ns))
            self._due_ns += self._interval_ns
