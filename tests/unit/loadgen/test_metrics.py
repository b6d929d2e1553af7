import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadgen import expectations, metrics
from loadgen.config import RunConfig, Workload
from loadgen.expectations import Verdict
from loadgen.metrics import WakeSource
from loadgen.record import (
    AgentRecord,
    Failure,
    KvFound,
    LoopLag,
    Record,
    RequestRecord,
    RunInfo,
    StatsRecord,
)

WORKLOAD = Workload(total_agents=2, arrival_rate=1.0, think_time_min=1.0, think_time_max=1.0)


def run_info(**changes) -> RunInfo:
    base = RunInfo(
        name="test",
        config=RunConfig(WORKLOAD),
        config_file="test.yaml",
        target="djinn",
        server="here:1",
        model={"model": "tiny"},
        policy="semantic",
        start_unix_ns=0,
        stats_before={"stores": 3, "loads": 1, "stored_bytes": 300, "loaded_bytes": 100},
        stats_after={"stores": 10, "loads": 2, "stored_bytes": 1000, "loaded_bytes": 150},
        loop_lag=[LoopLag(0, 100, 0.1, 0.5, 2.0)],
    )
    return msgspec.structs.replace(base, **changes)


def reason(agent: int = 0, **changes) -> RequestRecord:
    base = RequestRecord(
        agent=agent,
        step=0,
        scheduled_s=1.0,
        sent_s=1.1,
        first_token_s=1.3,
        end_s=2.0,
        output_tokens=3,
        deltas=[(1.3, 1), (1.5, 1), (2.0, 1)],
        finish_reason="length",
        kv=KvFound(),
    )
    return msgspec.structs.replace(base, **changes)


def reflect(agent: int = 0, **changes) -> RequestRecord:
    changes = {"step": 1, "scheduled_s": 4.0, "compute_s": 4.1, "sent_s": 4.1} | changes
    changes = {"first_token_s": 4.15, "end_s": 4.5, "deltas": [(4.15, 3)]} | changes
    return reason(agent, **changes)


def agent(number: int = 0, **changes) -> AgentRecord:
    base = AgentRecord(
        agent=number,
        name=f"agent-{number}",
        scheduled_s=1.0,
        session_id=f"s{number}",
        open_sent_s=1.0,
        opened_s=1.05,
        done_s=4.5,
        closed_s=4.6,
    )
    return msgspec.structs.replace(base, **changes)


def test_a_run_of_two_agents():
    moved = KvFound(loaded_blocks=4, loaded_bytes=400)
    records: list[Record] = [
        agent(0),
        agent(1, opened_s=5.0, closed_s=9.0),
        reason(0),
        reflect(0, kv=moved),
        reason(1),
        reflect(1, first_token_s=4.2, end_s=5.0),
    ]
    report = metrics.compute(run_info(), records)
    value = report.aggregates
    assert value["success_count"] == 2
    assert value["requests_ok"] == 4
    assert value["duration_s"] == 5.0
    assert value["throughput_ops_per_sec"] == pytest.approx(0.8)
    assert value["swap_events"] == 7
    assert value["restore_events"] == 1
    assert (value["swap_bytes"], value["restore_bytes"]) == (700, 50)
    assert (value["wakes"], value["wakes_moved"], value["wakes_resident"]) == (2, 1, 1)
    assert value["p50_wake_latency_ms"] == pytest.approx(50)
    assert value["p99_wake_latency_ms"] == pytest.approx(100)
    assert value["p99_wake_moved_latency_ms"] == pytest.approx(50)
    assert value["p99_wake_resident_latency_ms"] == pytest.approx(100)
    assert value["p99_reason_latency_ms"] == pytest.approx(1000)
    assert value["p99_latency_ms"] == pytest.approx(1000)
    assert value["peak_live_agents"] == 1
    assert report.passed
    assert report.agents[0].reason_latency_ms == pytest.approx(1000)
    assert report.agents[0].arrival_time_s == 1.0
    assert report.agents[1].wake_latency_ms == pytest.approx(100)


def test_latency_counts_from_the_scheduled_time():
    late = reason(0, sent_s=100.0, first_token_s=100.1, end_s=100.2)
    report = metrics.compute(run_info(), [agent(0), late])
    assert report.aggregates["p99_reason_latency_ms"] == pytest.approx(99_200)
    assert report.aggregates["p99_ttft_ms"] == pytest.approx(100)


def test_wake_latency_counts_from_the_signal_to_the_first_token():
    assert metrics.wake_latency_ms(reflect()) == pytest.approx(50)
    assert metrics.wake_latency_ms(reason()) is None
    assert metrics.wake_latency_ms(reflect(first_token_s=None)) is None


@pytest.mark.parametrize(
    ("kv", "source"),
    [
        (None, WakeSource.UNKNOWN),
        (KvFound(held_blocks=9), WakeSource.RESIDENT),
        (KvFound(resident_blocks=9), WakeSource.RESIDENT),
        (KvFound(resident_blocks=9, loaded_blocks=1), WakeSource.MOVED),
        (KvFound(loaded_blocks=9, recomputed_tokens=1), WakeSource.RECOMPUTED),
    ],
)
def test_where_the_kv_of_a_wake_was(kv, source):
    assert metrics.wake_source(reflect(kv=kv)) is source


def test_a_wake_on_a_worker_started_again_was_recomputed():
    again = reflect(kv=KvFound(), resends=1, appended_tokens=32, prefilled_tokens=1106)
    assert metrics.wake_source(again) is WakeSource.RECOMPUTED
    late = reflect(kv=KvFound(), resends=1, appended_tokens=32, prefilled_tokens=33)
    assert metrics.wake_source(late) is WakeSource.RESIDENT


def test_failed_requests_count_but_not_their_latencies():
    failure = Failure("ENGINE_LOST", "gone")
    records: list[Record] = [
        agent(0),
        agent(1, failure=failure),
        reason(0),
        reason(1, end_s=99.0, failure=failure),
    ]
    report = metrics.compute(run_info(), records)
    assert report.aggregates["requests_failed"] == 1
    assert report.aggregates["p99_latency_ms"] == pytest.approx(1000)
    assert report.aggregates["success_count"] == 1
    assert [(e.reason, e.count) for e in report.errors] == [("ENGINE_LOST", 1)]
    assert not report.passed


def test_agents_without_a_record_have_failed():
    report = metrics.compute(run_info(), [agent(0), reason(0)])
    assert report.aggregates["failed_count"] == 1
    assert [(e.reason, e.count) for e in report.errors] == [("NO_RECORD", 1)]


def test_a_run_without_any_record_has_a_report():
    report = metrics.compute(run_info(stats_before={}, stats_after={}), [])
    assert report.aggregates["p99_wake_latency_ms"] is None
    assert report.aggregates["swap_events"] is None
    assert report.aggregates["throughput_ops_per_sec"] is None
    assert not report.passed


def test_a_late_event_loop_makes_latencies_invalid_and_their_bounds_void():
    bounds = {"p99_wake_latency_ms": 500.0, "swaps_gt": 1.0, "success_count": 1.0}
    config = RunConfig(WORKLOAD, expected_results=bounds)
    late = [LoopLag(0, 10, 0.1, 0.9, 9.0), LoopLag(1, 10, 0.1, 1.1, 9.0, 7)]
    report = metrics.compute(run_info(config=config, loop_lag=late), [agent(0), reflect(0)])
    assert "process 1 was 1.1 ms late" in report.latency_problem
    assert "took its core away 7 times" in report.latency_problem
    verdicts = {check.name: check.verdict for check in report.checks}
    assert verdicts == {
        "p99_wake_latency_ms": Verdict.VOID,
        "swaps_gt": Verdict.PASS,
        "success_count": Verdict.PASS,
    }
    assert not report.passed


def test_every_agent_is_expected_to_succeed_unless_the_file_says_otherwise():
    checks = metrics.compute(run_info(), [agent(0)]).checks
    assert [(c.name, c.bound, c.verdict) for c in checks] == [("success_count", 2, Verdict.FAIL)]


@pytest.mark.parametrize(
    ("values", "expected"),
    [([], 0), ([5], 0), ([5, 9], 4), ([5, 9, 2, 3], 7), ([5, 5, 0, 1], 1)],
)
def test_a_counter_that_goes_back_belongs_to_a_server_started_again(values, expected):
    assert metrics.increase(values) == expected


def test_what_was_counted_before_a_restart_is_not_lost():
    samples: list[Record] = [StatsRecord(t, {"stores": n}) for t, n in ((1, 60), (2, 80), (3, 1))]
    info = run_info(stats_before={"stores": 50.0}, stats_after={"stores": 4.0})
    assert metrics.compute(info, samples).aggregates["swap_events"] == 34


def test_a_server_that_could_not_be_asked_before_the_run_is_counted_from_zero():
    info = run_info(stats_before={}, stats_after={"stores": 4.0})
    assert metrics.server_delta(info, [], "stores") == 4
    assert metrics.server_delta(info, [], "loads") is None


def test_every_result_that_can_be_bounded_is_computed():
    aggregates = metrics.compute(run_info(), [agent(0), reason(0)]).aggregates
    assert set(expectations.RESULTS) <= set(aggregates)


def test_gaps_between_tokens():
    request = reason(deltas=[(1.0, 1), (1.3, 3), (1.4, 1)])
    assert metrics.gaps_ms(request) == pytest.approx([100, 100, 100, 100])
    assert metrics.gaps_ms(reason(deltas=[])) == []


def test_live_agents_are_counted_from_open_to_close():
    lives = [
        agent(0, opened_s=0.0, closed_s=5.0),
        agent(1, opened_s=1.0, closed_s=2.0),
        agent(2, opened_s=2.0, closed_s=3.0),
        agent(3, opened_s=2.5, closed_s=None, done_s=4.0),
        agent(4, opened_s=None, closed_s=None),
    ]
    assert metrics.compute(run_info(), lives).aggregates["peak_live_agents"] == 3


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1), st.sampled_from([0.5, 0.9, 0.99, 1.0]))
def test_a_quantile_is_the_least_measured_value_that_covers_its_share(values, fraction):
    value = metrics.quantile(sorted(values), fraction)
    assert value in values
    assert sum(v <= value for v in values) >= fraction * len(values)
    assert sum(v < value for v in values) < fraction * len(values)
