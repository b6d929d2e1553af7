import msgspec
import pytest

from loadgen import record
from loadgen.config import Mode, RunConfig, Workload
from loadgen.errors import RunFileError
from loadgen.record import (
    AgentRecord,
    Failure,
    KvFound,
    LoopLag,
    Record,
    RequestRecord,
    RunInfo,
    SignalRecord,
    StatsRecord,
    ToolRecord,
)

RECORDS: list[Record] = [
    AgentRecord(0, "a", 0.5, 0.6, 9.0, failure=Failure("X", "why")),
    SignalRecord(0, 1, "IO_WAIT", 2.0, 2.1),
    ToolRecord(0, 1, "search", 2.0, 4.0, 4.001),
    RequestRecord(
        agent=0,
        step=1,
        scheduled_s=4.0,
        sent_s=4.1,
        end_s=5.0,
        deltas=[(4.2, 1), (4.3, 2)],
        kv=KvFound(loaded_blocks=3),
        output="hallo\nyou",
    ),
    StatsRecord(1.0, {"stores": 3.0}),
]
INFO = RunInfo(
    name="n",
    config=RunConfig(
        Workload(
            total_agents=1, arrival_rate=1, think_time_min=0, think_time_max=0, mode=Mode.LIVE
        ),
        expected_results={"swaps_gt": 3},
    ),
    config_file="c.yaml",
    target="djinn",
    server="s:1",
    model={"model": "tiny", "vocab_size": 5},
    start_unix_ns=1,
    loop_lag=[LoopLag(0, 1, 0.1, 0.2, 0.3)],
)


def test_records_survive_the_file(tmp_path):
    (tmp_path / record.REQUESTS_FILE).write_bytes(record.encode(RECORDS))
    assert record.read_requests(tmp_path) == RECORDS


def test_a_record_is_one_line_that_says_what_it_is():
    lines = record.encode(RECORDS).decode().splitlines()
    assert len(lines) == len(RECORDS)
    events = [msgspec.json.decode(line)["event"] for line in lines]
    assert events == ["agent", "signal", "tool", "request", "stats"]


def test_a_run_survives_the_file(tmp_path):
    record.write_run(tmp_path, INFO)
    assert record.read_run(tmp_path) == INFO


@pytest.mark.parametrize("line", [b"{", b"[]", b'{"event":"other"}', b'{"event":"tool"}', b"\xff"])
def test_a_broken_line_is_named_by_number(line):
    with pytest.raises(RunFileError, match=r"^r\.jsonl:6: not a record") as caught:
        list(record.decode_lines(record.encode(RECORDS) + line, "r.jsonl"))
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_run_is_a_clear_error(tmp_path):
    with pytest.raises(RunFileError, match=r"run\.json: No such file"):
        record.read_run(tmp_path)
    with pytest.raises(RunFileError, match=r"requests\.jsonl: No such file"):
        record.read_requests(tmp_path)
    (tmp_path / record.RUN_FILE).write_text("{}")
    with pytest.raises(RunFileError, match=r"run\.json: not a run"):
        record.read_run(tmp_path)
