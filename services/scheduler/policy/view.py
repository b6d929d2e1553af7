"""What a policy sees: sessions, workers and the system at one moment.

A view is plain frozen data, made when it is looked at, so that the same policy runs in a service
and in a simulator of virtual time. A policy keeps none beyond the call it was given it for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from services.scheduler.domain import NO_KV, Phase, PoolState, Residency


@dataclass(frozen=True, slots=True)
class SessionView:
    """One session.

    Attributes:
        phase_since_s: When `phase` was entered.
        tool_name: The tool waited for; empty outside IO_WAIT.
        expected_wake_s: The median of when it is expected to wake; None: no idea.
        early_wake_s: When one in ten such sessions would have woken; None: no idea.
        connected: Its worker is connected and is known to hold it.
        generating: A Generate runs or waits.
        last_active_s: The latest of its last signal, its last Generate's end and its opening.
        moving: Name of the command that moves its KV and has not ended; empty: none.
        kv: Where its KV lies, as last reported, without what `moving` will do.
        failures: Times in a row that a move has failed.
    """

    session_id: str
    tenant_id: str
    priority: int
    phase: Phase
    phase_since_s: float
    tool_name: str
    expected_wake_s: float | None
    early_wake_s: float | None
    worker_id: str
    connected: bool
    generating: bool
    context_length: int
    last_active_s: float
    moving: str = ""
    kv: Residency = NO_KV
    failures: int = 0


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One connected worker.

    Attributes:
        sessions: Sessions placed on it.
        unreported_blocks: Blocks that sessions placed since its last report are expected to need.
        mean_step_s: Of the steps since the last report but one; None: there were none.
        load_bytes_per_s: Measured host-to-device speed; 0: not measured.
        prefill_tokens_per_s: Measured; 0: not measured.
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


class Sessions(Protocol):
    """All open sessions, each made into a view only when looked at."""

    def get(self, session_id: str) -> SessionView | None:
        """Returns one session; None if there is none."""

    def in_phase(self, phase: Phase) -> Iterator[SessionView]:
        """Yields every session in a phase; costs time in proportion to all sessions."""

    def count(self, phase: Phase) -> int:
        """Returns how many sessions are in a phase."""


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


@dataclass(frozen=True, slots=True)
class SystemView:
    """All workers and sessions.

    Attributes:
        workers: Connected workers by id.
        sessions: The open sessions.
    """

    workers: Mapping[str, WorkerView] = field(default_factory=dict)
    sessions: Sessions = field(default_factory=NoSessions)
