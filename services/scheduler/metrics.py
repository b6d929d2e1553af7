"""What the scheduler and its workers have done, for Prometheus and as the JSON of `/metrics/vmu`.

Numbers that the scheduler keeps anyway are read when somebody asks; only what is not kept is
counted as it happens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from services.scheduler.coordinator import Coordinator
from services.scheduler.domain import CommandResult, Counters, Phase, PoolState
from services.scheduler.registry import WorkerState

LIVE_PHASES = (Phase.OPEN, Phase.COMPUTE, Phase.IO_WAIT)
_SEND_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5)
_COPY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class Metrics:
    """The scheduler's own counts.

    Attributes:
        registry: What `/metrics` serves.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._signals = Counter(
            "djinn_scheduler_signals",
            "Phase signals by the phase the session was in after it, and whether it was applied.",
            ["phase", "outcome"],
            registry=self.registry,
        )
        self._refused = Counter(
            "djinn_scheduler_signals_refused",
            "Phase signals answered with an error, by its reason.",
            ["reason"],
            registry=self.registry,
        )
        self._commands = Counter(
            "djinn_scheduler_commands_sent",
            "Commands written to workers' streams, repeats included.",
            ["action"],
            registry=self.registry,
        )
        self._results = Counter(
            "djinn_scheduler_command_results",
            "Results of commands by their status code.",
            ["code"],
            registry=self.registry,
        )
        self._send_seconds = Histogram(
            "djinn_scheduler_signal_to_command_seconds",
            "From a signal's arrival to its command being written to the worker's stream.",
            ["action"],
            buckets=_SEND_BUCKETS,
            registry=self.registry,
        )
        self._copy_seconds = Histogram(
            "djinn_scheduler_command_copy_seconds",
            "From the first copy's start to the last one's end, of commands that copied.",
            buckets=_COPY_BUCKETS,
            registry=self.registry,
        )
        self._sent: dict[str, _Sent] = {}
        self._signal_counts = {
            (phase, applied): self._signals.labels(phase.name, "applied" if applied else "ignored")
            for phase in LIVE_PHASES
            for applied in (True, False)
        }

    def signal_taken(self, phase: Phase, applied: bool) -> None:
        """Counts a signal that was answered."""
        self._signal_counts[phase, applied].inc()

    def signal_refused(self, reason: str) -> None:
        """Counts a signal that failed."""
        self._refused.labels(reason).inc()

    def command_sent(self, action: str, waited_s: float | None) -> None:
        """Counts a command that was written, `waited_s` after the signal that caused it."""
        sent = self._sent.get(action)
        if sent is None:
            sent = self._sent[action] = _Sent(
                self._commands.labels(action), self._send_seconds.labels(action)
            )
        sent.count.inc()
        if waited_s is not None:
            sent.seconds.observe(waited_s)

    def command_ended(self, result: CommandResult) -> None:
        """Counts a command's result."""
        self._results.labels(result.code).inc()
        if result.copy_s > 0:
            self._copy_seconds.observe(result.copy_s)


@dataclass(frozen=True, slots=True)
class _Sent:
    """One action's metrics, so that they need not be looked up for each command."""

    count: Counter
    seconds: Histogram


class SystemCollector(Collector):
    """Reads sessions, commands in flight and the workers' reports when they are asked for."""

    def __init__(self, coordinator: Coordinator, clock: Callable[[], float]) -> None:
        self._coordinator = coordinator
        self._clock = clock

    def collect(self) -> Iterator[Metric]:
        """Yields the metrics of now."""
        coordinator = self._coordinator
        sessions = GaugeMetricFamily(
            "djinn_scheduler_sessions", "Open sessions by phase.", labels=["phase"]
        )
        for phase in LIVE_PHASES:
            sessions.add_metric([phase.name], coordinator.store.count(phase))
        yield sessions
        yield CounterMetricFamily(
            "djinn_scheduler_sessions_expired",
            "Sessions closed because there was no sign of their client for too long.",
            value=coordinator.store.expired,
        )
        yield GaugeMetricFamily(
            "djinn_scheduler_commands_in_flight",
            "Commands sent to workers that have not ended.",
            value=len(coordinator.reconciler),
        )
        yield GaugeMetricFamily(
            "djinn_scheduler_uptime_seconds",
            "Since the scheduler started.",
            value=self._clock() - coordinator.start_s,
        )
        workers = [worker for worker in coordinator.registry if worker.link is not None]
        yield GaugeMetricFamily("djinn_scheduler_workers", "Workers connected.", value=len(workers))
        placed = GaugeMetricFamily(
            "djinn_scheduler_worker_sessions", "Sessions placed on a worker.", labels=["worker"]
        )
        blocks = GaugeMetricFamily(
            "djinn_worker_pool_blocks",
            "KV blocks of a worker's pool by what they are used for, as last reported.",
            labels=["worker", "pool", "state"],
        )
        for worker in workers:
            worker_id = worker.hello.worker_id
            placed.add_metric([worker_id], len(worker.sessions))
            view = worker.view()
            for name, pool in (("device", view.device), ("host", view.host)):
                for state in ("free", "used", "reclaimable", "in_flight"):
                    blocks.add_metric([worker_id, name, state], getattr(pool, state))
        yield placed
        yield blocks
        yield from _predictions(coordinator)
        yield from _prefetches(coordinator)
        yield from _admission(coordinator)
        totals = coordinator.registry.totals()
        for column in fields(Counters):
            yield CounterMetricFamily(
                f"djinn_workers_{column.name}",
                f"Of all workers, lost ones included: {column.name.replace('_', ' ')}.",
                value=getattr(totals, column.name),
            )


def _predictions(coordinator: Coordinator) -> Iterator[Metric]:
    quality = coordinator.predictor.quality
    wakes = CounterMetricFamily(
        "djinn_scheduler_predicted_wakes",
        "Wakes by what their prediction rested on; none: there was no prediction.",
        labels=["source"],
    )
    wakes.add_metric(["none"], quality.unpredicted)
    error = GaugeMetricFamily(
        "djinn_scheduler_prediction_error_seconds",
        "Median absolute error of the median predicted, of late.",
        labels=["source"],
    )
    coverage = GaugeMetricFamily(
        "djinn_scheduler_prediction_coverage",
        "Share of wakes between the first and the ninth decile predicted, of late; 0.8 is right.",
        labels=["source"],
    )
    pinball = GaugeMetricFamily(
        "djinn_scheduler_prediction_pinball_seconds",
        "Mean pinball loss of deciles 1, 5 and 9, of late.",
        labels=["source"],
    )
    for source, found in quality.by_source().items():
        wakes.add_metric([source.value], found.wakes)
        error.add_metric([source.value], found.median_error_s)
        coverage.add_metric([source.value], found.coverage)
        pinball.add_metric([source.value], found.pinball_s)
    yield from (wakes, error, coverage, pinball)


def _prefetches(coordinator: Coordinator) -> Iterator[Metric]:
    tally = coordinator.dispatcher.whereabouts.prefetches
    counts = CounterMetricFamily(
        "djinn_scheduler_prefetches",
        "Prefetches by outcome; of those sent, the ones that are none of the others still wait.",
        labels=["outcome"],
    )
    for outcome in ("sent", "refused", "hits", "wasted"):
        counts.add_metric([outcome], getattr(tally, outcome))
    yield counts
    yield CounterMetricFamily(
        "djinn_scheduler_prefetched_bytes",
        "Bytes that prefetches moved to the device.",
        value=tally.loaded_bytes,
    )


def _admission(coordinator: Coordinator) -> Iterator[Metric]:
    admission = coordinator.admission
    yield GaugeMetricFamily(
        "djinn_scheduler_admission_queue",
        "Refused OpenSessions whose place in the queue is kept.",
        value=len(admission),
    )
    counts = CounterMetricFamily(
        "djinn_scheduler_admissions", "OpenSessions by outcome.", labels=["outcome"]
    )
    counts.add_metric(["admitted"], admission.admitted)
    counts.add_metric(["refused"], admission.refused)
    yield counts


def vmu(coordinator: Coordinator, now_s: float) -> dict[str, object]:
    """Returns the JSON of `/metrics/vmu`: the scheduler's numbers with its workers' added up."""
    registry = coordinator.registry
    totals = registry.totals()
    connected = [worker for worker in registry if worker.link is not None]
    return {
        "status": "draining" if coordinator.draining else "ok" if connected else "no workers",
        "uptime_s": round(now_s - coordinator.start_s, 3),
        "semantic_scheduler": {
            "enabled": coordinator.policy.uses_signals,
            "policy": coordinator.policy.name,
            "swap_pool": {
                "swaps_performed": totals.stores,
                "restores_performed": totals.loads,
                "bytes_swapped": totals.stored_bytes,
                "bytes_restored": totals.loaded_bytes,
                "pool_bytes_total": sum(_bytes(w, w.view().host.total) for w in connected),
                "pool_bytes_used": sum(_bytes(w, _held(w.view().host)) for w in connected),
            },
            "sessions": {phase.name: coordinator.store.count(phase) for phase in LIVE_PHASES},
            "evictions": totals.evictions,
            "restores": totals.restores,
            "prefetches": totals.prefetches,
            "drops": totals.drops,
            "resident_hit_blocks": totals.resident_hit_blocks,
            "commands_in_flight": len(coordinator.reconciler),
            "predictions": {
                source.value: asdict(found)
                for source, found in coordinator.predictor.quality.by_source().items()
            },
            "prefetch_outcomes": asdict(coordinator.dispatcher.whereabouts.prefetches),
            "admission": {
                "queued": len(coordinator.admission),
                "admitted": coordinator.admission.admitted,
                "refused": coordinator.admission.refused,
            },
        },
        "counters": asdict(totals),
        "workers": [_worker(worker) for worker in connected],
    }


def _worker(worker: WorkerState) -> dict[str, object]:
    view = worker.view()
    return {
        "worker_id": view.worker_id,
        "endpoint": worker.hello.endpoint,
        "metrics_endpoint": worker.hello.metrics_endpoint,
        "model": view.model,
        "draining": view.draining,
        "sessions": view.sessions,
        "running_sequences": view.running_sequences,
        "waiting_requests": view.waiting_requests,
        "device": asdict(view.device),
        "host": asdict(view.host),
        "counters": asdict(worker.report.counters if worker.report else Counters()),
    }


def _bytes(worker: WorkerState, blocks: int) -> int:
    return blocks * worker.hello.model.block_bytes


def _held(pool: PoolState) -> int:
    return pool.total - pool.free
