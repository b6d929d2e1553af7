import io

import msgspec
import pytest
from rich.console import Console

from loadgen import comparison, metrics
from loadgen.comparison import Comparison
from loadgen.config import RunConfig, Workload
from loadgen.record import AgentRecord, LoopLag, Record, RequestRecord, RunInfo

WORKLOAD = Workload(total_agents=1, arrival_rate=1.0, think_time_min=1.0, think_time_max=1.0)
INFO = RunInfo(
    name="test",
    config=RunConfig(WORKLOAD),
    config_file="test.yaml",
    target="djinn",
    server="here:1",
    model={"model": "tiny"},
    policy="semantic",
    start_unix_ns=0,
    stats_after={"stored_bytes": 2_500_000.0, "recomputed_tokens": 0.0, "prefilled_tokens": 42.0},
)
OTHER = msgspec.structs.replace(INFO, target="openai", policy="", stats_after={})


def request(step, *, prompt, appended, prefilled, wake_s=0.0):
    return RequestRecord(
        agent=0,
        step=step,
        scheduled_s=step,
        compute_s=step or None,
        sent_s=step,
        first_token_s=step + 0.1 + wake_s,
        end_s=step + 0.5,
        appended_tokens=appended,
        output_tokens=1,
        prompt_tokens=prompt,
        prefilled_tokens=prefilled,
        deltas=[(step + 0.1 + wake_s, 1)],
    )


def records(*, prefilled, wake_s=0.0) -> list[Record]:
    return [
        AgentRecord(0, "a", 0.0, 0.0, 2.0, opened_s=0.0, closed_s=2.0),
        request(0, prompt=32, appended=32, prefilled=32),
        request(1, prompt=43, appended=10, prefilled=prefilled, wake_s=wake_s),
    ]


def column(name, info, some):
    return comparison.result(name, name, info, some, metrics.compute(info, some))


@pytest.fixture
def two():
    first = column("djinn", INFO, records(prefilled=11))
    second = column("peer", OTHER, records(prefilled=43, wake_s=0.3))
    return Comparison("test", 7, 1, (first, second))


def test_what_a_server_does_not_count_is_not_zero(two):
    djinn, peer = (system.values for system in two.systems)
    assert djinn["swap_bytes"] == 2_500_000
    assert peer["swap_bytes"] is None
    assert peer["p99_wake_moved_latency_ms"] is None


def test_what_was_computed_again_comes_from_the_requests_of_who_has_no_counters(two):
    djinn, peer = (system.values for system in two.systems)
    assert (djinn["prefilled_tokens"], djinn["recomputed_tokens"]) == (42, 0)
    # 43 tokens, of which 10 are new and one was generated and never prefilled.
    assert (peer["prefilled_tokens"], peer["recomputed_tokens"]) == (75, 32)
    unknown = column("quiet", OTHER, records(prefilled=0))
    assert unknown.values["recomputed_tokens"] is None


def test_ratios_are_to_the_first(two):
    first, second = two.systems
    assert comparison.ratio(two, "p99_wake_latency_ms", first) == 1.0
    assert comparison.ratio(two, "p99_wake_latency_ms", second) == pytest.approx(4.0)
    assert comparison.ratio(two, "swap_bytes", second) is None
    assert comparison.ratio(two, "recomputed_tokens", second) is None


def test_json_has_values_and_ratios(two):
    data = msgspec.json.decode(comparison.to_json(two))
    assert (data["workload"], data["seed"], data["agents"]) == ("test", 7, 1)
    assert data["systems"][1]["ratios"]["p50_wake_latency_ms"] == pytest.approx(4.0)
    assert msgspec.json.decode(comparison.to_json(two), type=Comparison) == two


def shown(found):
    out = io.StringIO()
    comparison.show(found, Console(file=out, width=120))
    return out.getvalue()


def test_the_table_has_a_column_for_each(two):
    lines = {line.split("  ")[0]: line for line in shown(two).splitlines()}
    assert "100.0 ms" in lines["wake p99"]
    assert "400.0 ms" in lines["wake p99"]
    assert "4 ×" in lines["wake p99"]
    assert "2.5 MB" in lines["stored to the host"]
    assert "n/a" in lines["stored to the host"]


def test_what_makes_figures_doubtful_is_said(two):
    late = msgspec.structs.replace(OTHER, interrupted=True, loop_lag=[LoopLag(0, 9, 1.0, 9.0, 9.0)])
    text = shown(Comparison("test", 7, 1, (column("peer", late, records(prefilled=43)),)))
    assert "peer: the run was stopped before its end" in text
    assert "peer: latencies are not valid: event loop of client process 0 was 9.0 ms late" in text
