import io

import msgspec
import pytest
from rich.console import Console

from loadgen import trace
from loadgen.errors import RunFileError
from loadgen.spans import Span

MS = 1_000_000


def span(span_id, name, start_ms, end_ms, parent="", trace_id="t1", **extra):
    return {
        "traceId": trace_id,
        "spanId": span_id,
        "parentSpanId": parent,
        "name": name,
        "startTimeUnixNano": str(start_ms * MS),
        "endTimeUnixNano": str(end_ms * MS),
    } | extra


def line(service, *spans) -> bytes:
    resource = {"attributes": [{"key": "service.name", "value": {"stringValue": service}}]}
    request = {"resourceSpans": [{"resource": resource, "scopeSpans": [{"spans": list(spans)}]}]}
    return msgspec.json.encode(request) + b"\n"


CLIENT = line(
    "client",
    span(
        "a",
        "agent.wake",
        100,
        150,
        attributes=[{"key": "gen_ai.conversation.id", "value": {"stringValue": "s-7"}}],
    ),
    span(
        "b",
        "generate",
        101,
        400,
        "a",
        events=[{"name": "first_token", "timeUnixNano": str(149 * MS)}],
    ),
    span("z", "agent.wake", 500, 520, trace_id="t2"),
)
WORKER = line(
    "worker",
    span(
        "d",
        "kv.restore",
        105,
        130,
        "c",
        attributes=[{"key": "djinn.kv.bytes", "value": {"intValue": "4200000"}}],
        status={"code": 2, "message": "no room"},
    ),
)
SCHEDULER = line("scheduler", span("c", "policy.decide", 103, 104, "a"))


@pytest.fixture
def run(tmp_path):
    (tmp_path / "traces-client.jsonl").write_bytes(CLIENT)
    (tmp_path / "traces-server.jsonl").write_bytes(WORKER + b"\n" + SCHEDULER)
    return tmp_path


def drawn(spans) -> list[str]:
    out = io.StringIO()
    trace.waterfall(spans, Console(file=out, width=200))
    return out.getvalue().splitlines()


def test_wakes_come_slowest_first_with_spans_of_every_process(run):
    wakes = trace.slowest_wakes(trace.read(trace.files_of(run)), 5)
    assert [wake[0].trace_id for wake in wakes] == ["t1", "t2"]
    assert {span.service for span in wakes[0]} == {"client", "worker", "scheduler"}
    assert len(trace.slowest_wakes(trace.read(trace.files_of(run)), 1)) == 1


def test_a_waterfall_shows_the_tree_the_times_and_why(run):
    title, *lines, stages = drawn(trace.slowest_wakes(trace.read(trace.files_of(run)), 1)[0])
    assert stages.startswith("50.0 ms = signal 0.0 + ")
    assert title == "agent.wake s-7 50.0 ms, trace t1"
    names = [text.split()[0] for text in lines]
    assert names == ["agent.wake", "generate", "policy.decide", "kv.restore"]
    assert [len(text) - len(text.lstrip()) for text in lines] == [0, 2, 2, 4]
    wake, generate, _, restore = lines
    assert "0.0 +    50.0 ms" in wake
    assert "→" in generate
    assert "first_token at +48.0 ms" in generate
    assert "copied 4.2 MB" in restore
    assert "no room" in restore


def test_bars_lie_where_the_time_was(run):
    spans = trace.slowest_wakes(trace.read(trace.files_of(run)), 1)[0]
    lines = drawn(spans)
    wake, restore = lines[1], lines[4]
    begin = wake.index("━")
    # 25 of the 50 ms that the wake took, from its fifth on.
    assert restore.count("━") == pytest.approx(wake.count("━") / 2, abs=1)
    assert restore.index("━") - begin == pytest.approx(wake.count("━") / 10, abs=1)


def test_a_span_whose_parent_is_missing_is_shown_as_a_root():
    orphan = Span("t", "x", "gone", "kv.restore", "worker", 0, MS)
    assert drawn([orphan])[1].startswith("kv.restore")


def test_a_span_of_no_length_has_a_mark():
    point = Span("t", "x", "", "agent.wake", "client", 5, 5)
    assert "━" in drawn([point])[1]


@pytest.mark.parametrize("broken", [b"{", b"[]", b'{"resourceSpans":[{"scopeSpans":3}]}', b"3"])
def test_a_broken_line_is_named_by_number(tmp_path, broken):
    path = tmp_path / "t.jsonl"
    path.write_bytes(CLIENT + broken)
    with pytest.raises(RunFileError, match=r"t\.jsonl:2: not a line of OTLP JSON"):
        trace.read([path])


def test_a_run_without_traces_says_what_to_do(tmp_path):
    with pytest.raises(RunFileError, match="run with --trace"):
        trace.files_of(tmp_path)
    with pytest.raises(RunFileError, match="No such file"):
        trace.read([tmp_path / "none.jsonl"])


def test_a_single_file_will_do(run):
    assert trace.files_of(run / "traces-client.jsonl") == [run / "traces-client.jsonl"]
