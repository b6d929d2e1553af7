"""The worker's Prometheus metrics and its `/metrics/vmu`."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from services.common.errors import DjinnError
from services.worker import messages
from services.worker.front.generation import Generation

LATENCY_BUCKETS = (
    0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5,
    0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 45.0, 60.0,
)  # fmt: skip
STEP_BUCKETS = (
    0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5,
    1.0, 2.0, 5.0,
)  # fmt: skip
BATCH_BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)

_COUNTERS = {
    "stores": "Completed device-to-host copy jobs, of one session each.",
    "loads": "Completed host-to-device copy jobs, of one session each.",
    "resident_hit_blocks": "Blocks that a restore found still on the device.",
    "evictions": "Sessions evicted.",
    "restores": "Sessions restored.",
    "prefetches": "Sessions brought back ahead of their wake.",
    "drops": "Sessions whose KV was forgotten.",
    "preemptions": "Running requests put back to make room.",
    "prefilled_tokens": "Tokens prefilled.",
    "recomputed_tokens": "Tokens prefilled again because their KV had been lost.",
    "prefix_hit_tokens": "Prompt tokens found in the shared prefix index.",
    "generated_tokens": "Tokens generated.",
    "requests_completed": "Requests that ended well.",
    "requests_failed": "Requests that ended in an error of the worker.",
    "requests_cancelled": "Requests cancelled by their client.",
}


class WorkerMetrics:
    """Everything the worker counts."""

    def __init__(self, worker_id: str, model: str) -> None:
        """Makes the metrics of one worker.

        Args:
            worker_id: Its name.
            model: What it serves: the label ``gen_ai_request_model``.
        """
        self.registry = CollectorRegistry(auto_describe=True)
        self._worker_id = worker_id
        self._block_bytes = 0
        self._report: messages.Report | None = None
        label = ("gen_ai_request_model",)
        self._first_token = Histogram(
            "gen_ai_server_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            label,
            buckets=LATENCY_BUCKETS,
            registry=self.registry,
        ).labels(model)
        self._per_token = Histogram(
            "gen_ai_server_time_per_output_token_seconds",
            "Mean time per token of a request after its first.",
            label,
            buckets=LATENCY_BUCKETS,
            registry=self.registry,
        ).labels(model)
        self._duration = Histogram(
            "gen_ai_server_request_duration_seconds",
            "From a request's arrival to its end.",
            label,
            buckets=LATENCY_BUCKETS,
            registry=self.registry,
        ).labels(model)
        self._refused = Counter(
            "djinn_requests_refused",
            "Requests that ended in an error, by its reason.",
            ("reason",),
            registry=self.registry,
        )
        self._step_seconds = Histogram(
            "djinn_step_seconds",
            "Duration of a model step.",
            buckets=STEP_BUCKETS,
            registry=self.registry,
        )
        self._step_batch_size = Histogram(
            "djinn_step_batch_size",
            "Sequences in a model step.",
            buckets=BATCH_BUCKETS,
            registry=self.registry,
        )
        self.registry.register(_ReportCollector(self))

    @property
    def report(self) -> messages.Report | None:
        """The engine's last report; None before the first."""
        return self._report

    def on_ready(self, ready: messages.Ready) -> None:
        """The engine has told its sizes."""
        self._block_bytes = ready.block_bytes

    def on_report(self, report: messages.Report) -> None:
        """The engine has reported."""
        self._report = report
        for seconds in report.step_seconds:
            self._step_seconds.observe(seconds)
        for size in report.step_batch_sizes:
            self._step_batch_size.observe(size)

    def on_generation_over(self, generation: Generation) -> None:
        """A request that reached the engine is over."""
        times = generation.times
        if generation.error is not None:
            self.on_refused(generation.error)
        if times.first_token_ns:
            self._first_token.observe((times.first_token_ns - times.received_ns) / 1e9)
            if generation.token_count > 1:
                elapsed = (times.last_token_ns - times.first_token_ns) / 1e9
                self._per_token.observe(elapsed / (generation.token_count - 1))
        self._duration.observe((times.ended_ns - times.received_ns) / 1e9)

    def on_refused(self, error: DjinnError) -> None:
        """A request has been answered with an error."""
        self._refused.labels(error.reason).inc()

    def vmu(self) -> dict[str, object]:
        """Returns the JSON of ``/metrics/vmu``: the scheduler's shape, for this worker alone."""
        report = self._report
        counters = report.counters if report is not None else messages.Counters()
        host = report.host if report is not None else messages.PoolState()
        return {
            "status": "ok" if report is not None else "starting",
            "worker_id": self._worker_id,
            "semantic_scheduler": {
                "swap_pool": {
                    "swaps_performed": counters.stores,
                    "restores_performed": counters.loads,
                    "bytes_swapped": counters.stored_bytes,
                    "bytes_restored": counters.loaded_bytes,
                    "pool_bytes_total": host.total * self._block_bytes,
                    "pool_bytes_used": (host.total - host.free) * self._block_bytes,
                },
                "sessions": report.sessions if report is not None else 0,
                "evictions": counters.evictions,
                "restores": counters.restores,
                "prefetches": counters.prefetches,
                "drops": counters.drops,
                "resident_hit_blocks": counters.resident_hit_blocks,
            },
        }


class _ReportCollector(Collector):
    """Shows the engine's last report as it is, without a second set of counters to keep."""

    def __init__(self, metrics: WorkerMetrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        report = self._metrics.report
        if report is None:
            return
        blocks = GaugeMetricFamily(
            "djinn_blocks", "Blocks of a pool by use.", labels=("pool", "state")
        )
        for pool, counts in (("device", report.device), ("host", report.host)):
            for state in ("free", "used", "reclaimable", "in_flight"):
                blocks.add_metric((pool, state), getattr(counts, state))
        yield blocks
        moved = CounterMetricFamily(
            "djinn_kv_bytes", "Bytes of KV copied, by direction.", labels=("direction",)
        )
        moved.add_metric(("store",), report.counters.stored_bytes)
        moved.add_metric(("load",), report.counters.loaded_bytes)
        yield moved
        for name, value, text in (
            ("djinn_sessions", report.sessions, "Sessions held."),
            ("djinn_running_sequences", report.running_sequences, "Sequences in the batch."),
            ("djinn_waiting_requests", report.waiting_requests, "Requests waiting to run."),
            ("djinn_loads_in_flight", report.loads_in_flight, "Loads queued or under way."),
            ("djinn_stores_in_flight", report.stores_in_flight, "Stores queued or under way."),
            (
                "djinn_load_bytes_per_second",
                report.load_bytes_per_s,
                "Measured speed of host-to-device copies.",
            ),
            (
                "djinn_prefill_tokens_per_second",
                report.prefill_tokens_per_s,
                "Measured speed of prefill.",
            ),
        ):
            yield GaugeMetricFamily(name, text, value=value)
        for name, text in _COUNTERS.items():
            value = getattr(report.counters, name)
            yield CounterMetricFamily(f"djinn_{name}", text, value=value)
