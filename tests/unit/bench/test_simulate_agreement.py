import json

import pytest

from bench import simulate_agreement as agreement
from loadgen.record import RunInfo
from tests.support.simulated import worker_parameters

BLOCK_BYTES, BLOCK_TOKENS = 16_000, 16


def test_the_difference_is_relative_to_the_real_run():
    real = {"p50_wake_latency_ms": 10.0, "evictions": 0.0, "throughput_ops_per_sec": None}
    simulated = {"p50_wake_latency_ms": 12.0, "evictions": 0.0, "throughput_ops_per_sec": 3.0}
    wake, evictions = agreement.compare(real, simulated)
    assert wake.name == "p50_wake_latency_ms"
    assert wake.difference == pytest.approx(0.2)
    assert evictions.difference == 0.0
    assert agreement.Compared("evictions", 0.0, 1.0).difference == float("inf")


def test_what_was_measured_becomes_a_workers_parameters(tmp_path):
    steps = tmp_path / "steps.json"
    # 1,000 bytes per token at 1 GB/s: a context of 100 takes 0.1 ms to read.
    rows = [{"shape": {"sequences": 1, "context": 99, "new": 1}, "step_ms": 2.1}]
    speeds = {"memory_bytes_per_s": 1e9, "load_bytes_per_s": 5e9, "store_bytes_per_s": 4e9}
    steps.write_text(json.dumps({"rows": rows, "speeds": speeds}))
    args = agreement.flags().parse_args([])
    info = RunInfo(
        name="real",
        config=agreement.workload(args),
        config_file="",
        target="djinn",
        server="",
        model={
            "model": "tiny",
            "block_size_tokens": BLOCK_TOKENS,
            "block_bytes": BLOCK_BYTES,
            "max_context_length": 4096,
        },
        start_unix_ns=0,
        stats_after={"device_total_blocks": 10, "host_total_blocks": 20},
    )
    found = agreement.measured(info, steps, args)
    [(rows_in_step, seconds)] = found.step.rows
    assert rows_in_step == 1
    assert seconds == pytest.approx(0.002)
    assert (found.device_blocks, found.host_blocks) == (10, 20)
    assert found.both_ways_bytes_per_s == 4e9


def test_steps_are_scaled_to_the_gap_between_tokens_and_the_rest_is_messages():
    worker = worker_parameters()
    bare = {"p50_itl_ms": 2.0, "p50_wake_latency_ms": 5.0}
    real = {"p50_itl_ms": 3.0, "p50_wake_latency_ms": 9.5}
    found = agreement.fitted(worker, real, bare)
    assert found.step.rows[0][1] == pytest.approx(1.5 * worker.step.rows[0][1])
    messages_s = found.latencies.submit_s + found.latencies.return_s
    assert messages_s == pytest.approx(0.0095 - 0.0075)
    faster = agreement.fitted(worker, {"p50_itl_ms": 2.0, "p50_wake_latency_ms": 4.0}, bare)
    assert faster.latencies.submit_s == 0.0
