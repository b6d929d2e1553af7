from __future__ import annotations

from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from services.common.errors import DrainingError, EngineLostError
from services.worker import messages
from services.worker.front.generation import Generation
from services.worker.front.metrics import LATENCY_BUCKETS, WorkerMetrics
from services.worker.front.session_log import SessionLog
from services.worker.front.text_stream import TextStream
from tests.support.stand_ins import READY, report, started, submit


def samples(metrics: WorkerMetrics) -> dict[tuple[str, ...], float]:
    text = generate_latest(metrics.registry).decode()
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def over(first_ns: int, last_ns: int, count: int) -> Generation:
    generation = Generation(submit(), SessionLog(), TextStream(None), lambda message: None)
    generation.on_started(started())
    generation.token_count = count
    times = generation.times
    times.received_ns, times.first_token_ns, times.last_token_ns = 0, first_ns, last_ns
    times.ended_ns = last_ns
    return generation


def test_before_the_first_report_nothing_is_made_up() -> None:
    metrics = WorkerMetrics("w", "m")
    assert ("djinn_sessions",) not in samples(metrics)
    assert metrics.vmu()["status"] == "starting"


def test_latencies_are_observed_in_seconds() -> None:
    metrics = WorkerMetrics("w", "m")
    metrics.on_generation_over(over(20_000_000, 120_000_000, 11))
    found = samples(metrics)
    assert found["gen_ai_server_time_to_first_token_seconds_sum", "m"] == 0.02
    assert found["gen_ai_server_time_per_output_token_seconds_sum", "m"] == 0.01
    assert found["gen_ai_server_request_duration_seconds_sum", "m"] == 0.12


def test_a_single_token_has_no_time_between_tokens() -> None:
    metrics = WorkerMetrics("w", "m")
    metrics.on_generation_over(over(20_000_000, 20_000_000, 1))
    assert samples(metrics)["gen_ai_server_time_per_output_token_seconds_count", "m"] == 0


def test_buckets_tell_apart_five_milliseconds_and_a_minute() -> None:
    assert LATENCY_BUCKETS[0] == 0.005
    assert LATENCY_BUCKETS[-1] == 60.0
    assert list(LATENCY_BUCKETS) == sorted(set(LATENCY_BUCKETS))


def test_errors_are_counted_by_reason() -> None:
    metrics = WorkerMetrics("w", "m")
    metrics.on_refused(DrainingError("x"))
    failed = over(1, 2, 1)
    failed.fail(EngineLostError("x"))
    metrics.on_generation_over(failed)
    found = samples(metrics)
    assert found["djinn_requests_refused_total", "DRAINING"] == 1
    assert found["djinn_requests_refused_total", "ENGINE_LOST"] == 1


def test_a_report_is_shown_as_it_is() -> None:
    metrics = WorkerMetrics("w", "m")
    metrics.on_ready(READY)
    metrics.on_report(report())
    found = samples(metrics)
    assert found["djinn_blocks", "device", "free"] == 4
    assert found["djinn_blocks", "host", "used"] == 5
    assert found["djinn_kv_bytes_total", "store"] == 300
    assert found["djinn_step_seconds_count",] == 2
    assert found["djinn_step_batch_size_sum",] == 4
    assert found["djinn_waiting_requests",] == 1


def test_every_counter_of_the_engine_has_a_metric() -> None:
    metrics = WorkerMetrics("w", "m")
    names = messages.Counters.__struct_fields__
    metrics.on_report(
        report(counters=messages.Counters(**{name: i + 1 for i, name in enumerate(names)}))
    )
    found = samples(metrics)
    special = {"stored_bytes": ("djinn_kv_bytes_total", "store"),
               "loaded_bytes": ("djinn_kv_bytes_total", "load")}  # fmt: skip
    for i, name in enumerate(names):
        assert found[special.get(name, (f"djinn_{name}_total",))] == i + 1


def test_vmu_has_the_seeds_shape() -> None:
    metrics = WorkerMetrics("w", "m")
    metrics.on_ready(READY)
    metrics.on_report(report())
    vmu = metrics.vmu()
    assert vmu["status"] == "ok"
    scheduler = vmu["semantic_scheduler"]
    assert isinstance(scheduler, dict)
    assert scheduler["swap_pool"] == {
        "swaps_performed": 3,
        "restores_performed": 2,
        "bytes_swapped": 300,
        "bytes_restored": 200,
        "pool_bytes_total": 20 * 1024,
        "pool_bytes_used": 5 * 1024,
    }
