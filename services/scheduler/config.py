"""The scheduler's configuration, parsed once."""

from __future__ import annotations

from dataclasses import dataclass, field

from services.common.config import TelemetryConfig


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """What the scheduler needs to start; every default is here and nowhere else.

    Attributes:
        host: Address to listen on, for both ports.
        port: Port of the gRPC services; 0 takes a free one.
        metrics_port: Port of ``/metrics``; 0 takes a free one.
        policy: Name of the policy.
        idle_threshold_s: A session whose client never signals counts as waiting once it has done
            nothing for this long.
        command_timeout_s: How long a worker has for a command before it is sent again.
        command_attempts: How often a command is sent at most.
        max_sessions: Most sessions open at once; None: no limit.
        worker_wait_s: How long OpenSession waits for a worker to connect when there is none.
        worker_grace_s: How long a session waits for its own worker to come back before another
            may take it.
        worker_silence_s: A worker that says nothing for this long is taken for lost.
        report_interval_s: How often workers report.
        tick_interval_s: How often the policy looks at the system as a whole.
        closed_sessions_kept: Closed sessions remembered at most.
        closed_session_ttl_s: How long a closed session is remembered at most.
        drain_timeout_s: How long calls may go on after SIGTERM.
        telemetry: Traces and logs.
    """

    host: str = "127.0.0.1"
    port: int = 5556
    metrics_port: int = 9095
    policy: str = "semantic"
    idle_threshold_s: float = 1.0
    command_timeout_s: float = 10.0
    command_attempts: int = 3
    max_sessions: int | None = None
    worker_wait_s: float = 5.0
    worker_grace_s: float = 2.0
    worker_silence_s: float = 30.0
    report_interval_s: float = 1.0
    tick_interval_s: float = 1.0
    closed_sessions_kept: int = 10_000
    closed_session_ttl_s: float = 600.0
    drain_timeout_s: float = 5.0
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
