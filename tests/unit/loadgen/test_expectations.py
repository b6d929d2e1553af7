import pytest

from loadgen import expectations
from loadgen.expectations import Verdict


@pytest.mark.parametrize(
    ("name", "result", "relation"),
    [
        ("p99_wake_latency_ms", "p99_wake_latency_ms", "<="),
        ("p99_request_latency_ms", "p99_latency_ms", "<="),
        ("swaps_gt", "swap_events", ">"),
        ("restores_ge", "restore_events", ">="),
        ("success_count", "success_count", ">="),
        ("throughput_ops_per_sec", "throughput_ops_per_sec", ">="),
        ("recomputed_tokens", "recomputed_tokens", "<="),
        ("p99_wake_latency_ms_lt", "p99_wake_latency_ms", "<"),
    ],
)
def test_a_bound_says_result_and_relation(name, result, relation):
    assert expectations.resolve(name) == (result, relation)


@pytest.mark.parametrize("name", ["swaps", "p98_latency_ms", "", "_gt", "success"])
def test_other_names_are_unknown(name):
    assert not expectations.known(name)


def test_hints_are_names_that_are_known():
    assert all(expectations.known(name) for name in expectations.names())


@pytest.mark.parametrize(
    ("name", "bound", "value", "verdict"),
    [
        ("swaps_gt", 100, 100, Verdict.FAIL),
        ("swaps_gt", 100, 101, Verdict.PASS),
        ("p99_wake_latency_ms", 500, 500, Verdict.PASS),
        ("p99_wake_latency_ms", 500, 500.1, Verdict.FAIL),
        ("success_count", 80, 79, Verdict.FAIL),
        ("success_count", 80, 80, Verdict.PASS),
    ],
)
def test_verdicts(name, bound, value, verdict):
    resolved = expectations.resolve(name)
    assert resolved is not None
    assert expectations.check(name, bound, {resolved[0]: value}, "").verdict is verdict


def test_a_missing_value_is_void():
    check = expectations.check("swaps_gt", 1, {"swap_events": None}, "")
    assert (check.verdict, check.value) == (Verdict.VOID, None)


def test_latencies_that_cannot_be_trusted_are_void_and_counts_are_not():
    values = {"p99_wake_latency_ms": 1.0, "swap_events": 3.0}
    late = expectations.check("p99_wake_latency_ms", 500, values, "loop was late")
    assert (late.verdict, late.reason) == (Verdict.VOID, "loop was late")
    assert expectations.check("swaps_gt", 1, values, "loop was late").verdict is Verdict.PASS
