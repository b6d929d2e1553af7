"""Wakes as their processes record them, in ms from the COMPUTE."""

from typing import Any

import msgspec
import pytest

from loadgen.spans import Span, SpanEvent
from loadgen.stages import STAGES, Stages, stages_of

MS = 1_000_000
T0 = 1_795_466_854 * 10**9


def span(span_id: str, name: str, start: float, end: float, parent: str = "", **events: float):
    return Span(
        trace_id="t",
        span_id=span_id,
        parent_id=parent,
        name=name,
        service="any",
        start_ns=T0 + round(start * MS),
        end_ns=T0 + round(end * MS),
        events=tuple(SpanEvent(key, T0 + round(at * MS)) for key, at in events.items()),
    )


WAKE = span("wake", "agent.wake", 0, 21)
CLIENT = [
    WAKE,
    span("told", "signal_phase", 0, 1.2, "wake"),
    span("asked", "generate", 0.1, 200, "wake", first_token=21),
]
SCHEDULER = [
    span("heard", "signal_phase", 0.4, 0.7, "told"),
    span("decided", "policy.decide", 0.5, 0.6, "heard"),
]
LOAD = span("load", "kv.restore", 0.8, 12.0, "decided", taken=0.9)
WORKER = [
    span("served", "generate", 1.0, 199, "asked", first_token=19.5, first_token_sent=19.6),
    span("queue", "queue", 1.0, 13.5, "served"),
    span("step", "prefill", 13.5, 19.0, "served"),
]
MOVED = [*CLIENT, *SCHEDULER, LOAD, *WORKER]


def parts(stages: Stages) -> dict[str, Any]:
    """The stages that took any time."""
    named = {name: getattr(stages, f"{name}_ms") for name in (*STAGES, "unaccounted")}
    assert sum(named.values()) == pytest.approx(stages.total_ms)
    assert min(named.values()) >= 0
    return {name: pytest.approx(ms) for name, ms in named.items() if ms > 1e-9}


def test_a_wake_that_loads_is_told_apart_to_the_end():
    stages = stages_of(MOVED)
    assert stages is not None
    assert parts(stages) == {
        "signal": 0.4,
        "decision": 0.2,
        "command": 0.3,
        "load": 11.1,
        "queue": 1.5,
        "step": 5.5,
        "return": 2.0,
    }
    assert str(stages) == (
        "21.0 ms = signal 0.4 + decision 0.2 + command 0.3 + load 11.1 + request 0.0 + "
        "queue 1.5 + step 5.5 + return 2.0"
    )


def test_the_order_of_the_spans_does_not_matter():
    assert stages_of(MOVED[::-1]) == stages_of(MOVED)


def test_a_generate_that_comes_after_the_load_is_waited_for():
    late = span("served", "generate", 12.8, 199, "asked", first_token=19.5)
    stages = stages_of([*CLIENT, *SCHEDULER, LOAD, late, *WORKER[1:]])
    assert stages is not None
    assert parts(stages)["load"] == 11.1
    assert parts(stages)["request"] == 0.8
    assert parts(stages)["queue"] == 0.7


def test_a_load_that_the_generate_began_counts_as_load():
    own = span("load", "kv.restore", 2.0, 12.0, "served")
    stages = stages_of([*CLIENT, *SCHEDULER, own, *WORKER])
    assert stages is not None
    assert parts(stages) == {
        "signal": 0.4,
        "decision": 0.2,
        "request": 0.4,
        "load": 10.0,
        "queue": 2.5,
        "step": 5.5,
        "return": 2.0,
    }


def test_a_signal_that_comes_after_the_generate_held_nothing_up():
    slow = [
        span("heard", "signal_phase", 15, 16, "told"),
        span("decided", "policy.decide", 15.5, 15.9, "heard"),
    ]
    stages = stages_of([*CLIENT, *slow, *WORKER])
    assert stages is not None
    assert parts(stages) == {"signal": 1.0, "queue": 12.5, "step": 5.5, "return": 2.0}


def test_of_several_attempts_the_one_that_answered_counts():
    lost = span("lost", "generate", 0.9, 3.0, "asked")
    assert stages_of([*MOVED, lost]) == stages_of(MOVED)


def test_without_the_servers_spans_the_time_is_unaccounted_for():
    stages = stages_of(CLIENT)
    assert stages is not None
    assert parts(stages) == {"unaccounted": 21.0}
    assert str(stages).endswith("+ return 0.0 + unaccounted 21.0")


def test_clocks_that_differ_show():
    def shifted(one: Span) -> Span:
        return msgspec.structs.replace(
            one,
            start_ns=one.start_ns - 5 * MS,
            end_ns=one.end_ns - 5 * MS,
            events=tuple(SpanEvent(e.name, e.time_ns - 5 * MS) for e in one.events),
        )

    stages = stages_of([*CLIENT, *SCHEDULER, *map(shifted, [LOAD, *WORKER])])
    assert stages is not None
    # The load is said to begin 4.7 ms before the decision that caused it.
    assert stages.skew_ms == pytest.approx(4.7)
    assert str(stages).endswith("(the clocks differ by 4.7 ms or more)")
    assert parts(stages)["return"] == 7.0


def test_another_trace_has_no_stages():
    assert stages_of([*SCHEDULER, *WORKER]) is None
    assert stages_of([]) is None
