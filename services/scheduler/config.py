"""The scheduler's configuration, parsed once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from services.common.config import TelemetryConfig
from services.common.errors import ConfigError
from services.scheduler.policy.options import PolicyOptions


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """What the scheduler needs to start; every default is here and nowhere else.

    Attributes:
        host: Address to listen on, for both ports.
        port: Port of the gRPC services; 0 takes a free one.
        metrics_port: Port of ``/metrics``; 0 takes a free one.
        policy: Name of the policy.
        policy_options: What the policy is told; its `idle_threshold_s` is the one below.
        idle_threshold_s: A session whose client never signals counts as waiting once it has done
            nothing for this long.
        command_timeout_s: How long a worker has for a command before it is sent again.
        command_attempts: How often a command is sent at most.
        max_sessions: Most sessions open at once; None: no limit.
        tenant_quotas: Most sessions open at once by tenant; ``"*"``: of each tenant not named.
        max_queued: Refused OpenSessions whose place in the queue is kept, at most.
        priority_aging_s: How long a wait in that queue one point of priority is worth.
        worker_wait_s: How long OpenSession waits for a worker to connect when there is none.
        worker_grace_s: How long a session waits for its own worker to come back before another
            may take it.
        worker_silence_s: A worker that says nothing for this long is taken for lost.
        report_interval_s: How often workers report.
        tick_interval_s: How often the policy looks at the system as a whole.
        session_ttl_s: A session of whose client there has been no sign for this long is closed;
            0: never.
        closed_sessions_kept: Closed sessions remembered at most.
        closed_session_ttl_s: How long a closed session is remembered at most.
        drain_timeout_s: How long calls may go on after SIGTERM.
        telemetry: Traces and logs.
    """

    host: str = "127.0.0.1"
    port: int = 5556
    metrics_port: int = 9095
    policy: str = "semantic"
    policy_options: PolicyOptions = field(default_factory=PolicyOptions)
    idle_threshold_s: float = 1.0
    command_timeout_s: float = 10.0
    command_attempts: int = 3
    max_sessions: int | None = None
    tenant_quotas: Mapping[str, int] = field(default_factory=dict)
    max_queued: int = 1000
    priority_aging_s: float = 1.0
    worker_wait_s: float = 5.0
    worker_grace_s: float = 2.0
    worker_silence_s: float = 30.0
    report_interval_s: float = 1.0
    tick_interval_s: float = 1.0
    session_ttl_s: float = 3600.0
    closed_sessions_kept: int = 10_000
    closed_session_ttl_s: float = 600.0
    drain_timeout_s: float = 5.0
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)

    def __post_init__(self) -> None:
        """Checks what no field can be checked for alone.

        Raises:
            ConfigError: A tenant's quota can never be had.
        """
        for tenant_id, quota in self.tenant_quotas.items():
            if quota < 1:
                raise ConfigError(f"--tenant-quota {tenant_id}={quota}: at least 1")
            if self.max_sessions is not None and quota > self.max_sessions:
                raise ConfigError(
                    f"--tenant-quota {tenant_id}={quota}: more than --max-sessions "
                    f"{self.max_sessions} in all"
                )
