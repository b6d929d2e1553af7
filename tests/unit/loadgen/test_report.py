import io

import msgspec
import pytest
from rich.console import Console

from loadgen import metrics, record, report
from loadgen.config import RunConfig, Workload
from loadgen.errors import RunFileError
from loadgen.record import AgentRecord, Failure, KvFound, LoopLag, Record, RequestRecord, RunInfo

WORKLOAD = Workload(total_agents=2, arrival_rate=1.0, think_time_min=1.0, think_time_max=1.0)
INFO = RunInfo(
    name="test",
    config=RunConfig(WORKLOAD, expected_results={"p99_wake_latency_ms": 500, "swaps_gt": 100}),
    config_file="test.yaml",
    target="djinn",
    server="here:1",
    model={"model": "[tiny]"},
    policy="semantic",
    labels=["oracle"],
    start_unix_ns=0,
    loop_lag=[LoopLag(0, 100, 0.1, 3.0, 4.0)],
    stats_after={"stores": 7.0, "stored_bytes": 2_500_000.0},
)
RECORDS: list[Record] = [
    AgentRecord(0, "a", 0.0, 0.0, 2.0, opened_s=0.01, closed_s=2.1),
    AgentRecord(1, "b", 0.0, 0.0, 2.0, failure=Failure("EXHAUSTED", "full [now]")),
    RequestRecord(
        agent=0,
        step=1,
        scheduled_s=1.0,
        compute_s=1.0,
        sent_s=1.0,
        first_token_s=1.0123,
        end_s=2.0,
        output_tokens=1,
        deltas=[(1.0123, 1)],
        kv=KvFound(loaded_blocks=1),
    ),
]


@pytest.fixture
def run(tmp_path):
    record.write_run(tmp_path, INFO)
    (tmp_path / record.REQUESTS_FILE).write_bytes(record.encode(RECORDS))
    return tmp_path


def shown(result) -> str:
    out = io.StringIO()
    report.show(result, Console(file=out, width=120))
    return out.getvalue()


def test_the_table_has_every_figure_and_verdict(run):
    text = shown(report.load(run))
    for part in (
        "test: [tiny] on djinn at here:1, policy semantic",
        "labels: oracle",
        "1 of 2 succeeded",
        "7 stores, 2.5 MB",
        "1 in all, 1 moved, 0 resident, 0 recomputed",
        "1 agents failed: EXHAUSTED: full [now]",
        "latencies are not valid: event loop of client process 0 was 3.0 ms late",
    ):
        assert part in text
    rows = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert "void" in rows["p99_wake_latency_ms"]
    assert "fail" in rows["swaps_gt"]
    assert "fail" in rows["success_count"]
    assert "12.3" in next(line for line in text.splitlines() if line.startswith("wake,"))


def test_what_a_server_does_not_say_is_a_question_mark(run):
    assert "restore_events  ? loads, ?" in shown(report.load(run))


def test_json_has_the_seed_names(run):
    result = report.load(run)
    data = msgspec.json.decode(report.save(run, result).read_bytes())
    assert data["passed"] is False
    assert data["aggregates"]["p99_wake_latency_ms"] == pytest.approx(12.3)
    for name in ("p99_latency_ms", "success_count", "swap_events", "restore_events"):
        assert name in data["aggregates"]
    assert "throughput_ops_per_sec" in data["aggregates"]
    for name in ("reason_latency_ms", "wake_latency_ms", "arrival_time_s"):
        assert name in data["agents"][0]


def test_an_empty_run_can_be_shown():
    result = metrics.compute(msgspec.structs.replace(INFO, stats_after={}), [])
    assert "0 of 2 succeeded" in shown(result)


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(RunFileError):
        report.load(tmp_path)
