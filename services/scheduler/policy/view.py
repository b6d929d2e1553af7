"""What a policy sees: sessions, workers and the system at one moment.

A view is plain frozen data, made when it is looked at, so that the same policy runs in a service
and in a simulator of virtual time. A policy keeps none beyond the call it was given it for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from services.scheduler.domain import NO_KV, Phase, PoolState, Residency
from services.scheduler.forecast import WakeForecast


@dataclass(frozen=True, slots=True)
class SessionView:
    """One session.

    Attributes:
        phase_since_s: When `phase` was entered.
        tool_name: The tool waited for; empty outside IO_WAIT.
        expected_wake_s: The median of when it is expected to wake, as its worker was last told;
            None: no idea.
        connected: Its worker is connected and is known to hold it.
        generating: A Generate runs or waits.
        last_active_s: The latest of its last signal, its last Generate's end and its opening.
        moving: Name of the command that moves its KV and has not ended; empty: none.
        kv: Where its KV lies, as last reported, without what `moving` will do.
        failures: Times in a row that a move has failed.
        forecast: The distribution of when it wakes; None: no idea, or only `expected_wake_s`.
        evicted_s: When its device blocks were let go; None: they are held, or it is not known.
        prefetched: It was brought back ahead of its wake since it last ran or signalled.
    """

    session_id: str
    tenant_id: str
    priority: int
    phase: Phase
    phase_since_s: float
    tool_name: str
    expected_wake_s: float | None
    worker_id: str
    connected: bool
    generating: bool
    context_length: int
    last_active_s: float
    moving: str = ""
    kv: Residency = NO_KV
    failures: int = 0
    forecast: WakeForecast | None = None
    evicted_s: float | None = None
    prefetched: bool = False


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One connected worker.

    Attributes:
        sessions: Sessions placed on it.
        unreported_blocks: Blocks that sessions placed since its last report are expected to need.
        mean_step_s: Of the steps since the last report but one; None: there were none.
        load_bytes_per_s: Measured host-to-device speed; 0: not measured.
        prefill_tokens_per_s: Measured; 0: not measured.
        max_running_sequences: Most sequences in one step; 0: not known.
        max_context_length: Most tokens of one session; 0: not known.
        full_s: When it last reported that no device block was free; None: never. Blocks let go
            since then are still on the device: free ones are used up first.
        prefetched_blocks: Blocks asked for by prefetches since its last report.
        prefetch_refused: It has refused a prefetch since its last report.
        dropped_blocks: Host blocks of sessions dropped since its last report.
        opened: Sessions placed on it since its last report.
        prompt_tokens: Tokens still to be prefilled of prompts that were let in and of wakes whose
            KV is lost, as far as known.
        recompute_share: Share of late of its time that goes to prefilling lost KV again.
    """

    worker_id: str
    model: str
    draining: bool
    block_bytes: int
    block_size_tokens: int
    device: PoolState
    host: PoolState
    sessions: int = 0
    unreported_blocks: int = 0
    running_sequences: int = 0
    waiting_requests: int = 0
    mean_step_s: float | None = None
    load_bytes_per_s: float = 0.0
    prefill_tokens_per_s: float = 0.0
    loads_in_flight: int = 0
    stores_in_flight: int = 0
    max_running_sequences: int = 0
    max_context_length: int = 0
    full_s: float | None = None
    prefetched_blocks: int = 0
    prefetch_refused: bool = False
    dropped_blocks: int = 0
    opened: int = 0
    prompt_tokens: int = 0
    recompute_share: float = 0.0


class Sessions(Protocol):
    """All open sessions, each made into a view only when looked at."""

    def get(self, session_id: str) -> SessionView | None:
        """Returns one session; None if there is none."""

    def in_phase(self, phase: Phase) -> Iterator[SessionView]:
        """Yields every session in a phase; costs time in proportion to all sessions."""

    def count(self, phase: Phase) -> int:
        """Returns how many sessions are in a phase."""

    def away(self, worker_id: str) -> Iterator[SessionView]:
        """Yields a worker's sessions whose device blocks were let go, furthest wake first."""

    def wanting(self, worker_id: str) -> Iterator[SessionView]:
        """Yields a worker's sessions that wait to be prefetched, nearest wake first."""

    def middle_wake_s(self, worker_id: str) -> float | None:
        """Returns the median of when those that are away wake; None: none is, or no idea."""

    def prefetching(self, worker_id: str) -> int:
        """Returns how many of a worker's prefetches have not ended."""


class NoSessions:
    """A system without sessions."""

    def get(self, session_id: str) -> SessionView | None:
        """Returns None."""
        del session_id
        return None

    def in_phase(self, phase: Phase) -> Iterator[SessionView]:
        """Yields nothing."""
        del phase
        return iter(())

    def count(self, phase: Phase) -> int:
        """Returns 0."""
        del phase
        return 0

    def away(self, worker_id: str) -> Iterator[SessionView]:
        """Yields nothing."""
        del worker_id
        return iter(())

    def wanting(self, worker_id: str) -> Iterator[SessionView]:
        """Yields nothing."""
        del worker_id
        return iter(())

    def middle_wake_s(self, worker_id: str) -> float | None:
        """Returns None."""
        del worker_id
        return None

    def prefetching(self, worker_id: str) -> int:
        """Returns 0."""
        del worker_id
        return 0


@dataclass(frozen=True, slots=True)
class SystemView:
    """All workers and sessions.

    Attributes:
        workers: Connected workers by id.
        sessions: The open sessions.
    """

    workers: Mapping[str, WorkerView] = field(default_factory=dict)
    sessions: Sessions = field(default_factory=NoSessions)
