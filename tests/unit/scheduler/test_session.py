from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import SessionClosedError
from services.scheduler.domain import NO_KV, Phase, Residency, SessionSnapshot
from services.scheduler.session import ClientStream, Session, Signal, Waited


def make(**fields) -> Session:
    defaults: dict[str, Any] = {
        "session_id": "a",
        "tenant_id": "",
        "name": "",
        "priority": 0,
        "cache_salt": "",
        "model": "",
        "opened_s": 100.0,
    }
    return Session(**(defaults | fields))


def wait(sequence, tool="", expected_s=None) -> Signal:
    return Signal(Phase.IO_WAIT, sequence, tool, expected_s)


def compute(sequence) -> Signal:
    return Signal(Phase.COMPUTE, sequence)


signals = st.builds(
    Signal,
    phase=st.sampled_from([Phase.COMPUTE, Phase.IO_WAIT]),
    sequence=st.integers(1, 50),
    tool_name=st.sampled_from(["", "search", "shell"]),
    expected_s=st.none() | st.floats(0.1, 100),
)


@given(
    st.lists(signals, min_size=1, unique_by=lambda signal: signal.sequence).flatmap(
        lambda said: st.lists(st.sampled_from(said), max_size=30).flatmap(
            lambda repeats: st.permutations(said + repeats)
        )
    )
)
def test_any_order_of_late_and_repeated_signals_ends_where_the_highest_says(arrivals):
    session = make()
    applied = set()
    for moment, signal in enumerate(arrivals):
        before = session.sequence
        transition = session.apply(signal, 100.0 + moment)
        assert transition.applied == (signal.sequence > before)
        if transition.applied:
            assert signal.sequence not in applied
            applied.add(signal.sequence)
    last = max(arrivals, key=lambda signal: signal.sequence)
    assert session.phase is last.phase
    assert session.sequence == last.sequence
    waiting = last.phase is Phase.IO_WAIT
    assert session.tool_name == (last.tool_name if waiting else "")
    assert session.expected_s == (last.expected_s if waiting else None)


def test_a_new_session_is_open_since_it_was_opened():
    session = make(opened_s=7.0)
    assert session.phase == Phase.OPEN
    assert session.sequence == 0
    assert session.phase_since_s == 7.0


def test_the_cycle_tells_how_long_each_tool_call_took():
    session = make()
    assert session.apply(wait(1, "search", 3.0), 110.0).waited is None
    transition = session.apply(compute(2), 114.5)
    assert transition.waited == Waited("search", 3.0, 4.5)
    assert session.phase_since_s == 114.5
    assert session.tool_name == ""


def test_a_gap_in_the_numbers_hides_how_long_the_tool_call_took():
    session = make()
    session.apply(wait(1, "search"), 110.0)
    transition = session.apply(compute(4), 200.0)
    assert transition.applied
    assert session.phase_since_s == 200.0
    assert transition.waited is None


def test_a_second_tool_call_in_a_row_begins_a_new_stay():
    session = make()
    session.apply(wait(1, "search"), 110.0)
    transition = session.apply(wait(2, "shell"), 120.0)
    assert transition.waited is None
    assert session.phase_since_s == 120.0
    assert session.tool_name == "shell"


def test_computing_on_is_no_new_stay():
    session = make()
    session.apply(compute(1), 110.0)
    transition = session.apply(compute(2), 120.0)
    assert transition.applied
    assert session.phase_since_s == 110.0


def test_an_ignored_signal_leaves_the_expected_wake_alone():
    session = make()
    session.apply(wait(3), 110.0)
    session.expected_wake_s = 130.0
    assert not session.apply(wait(3), 111.0).applied
    assert not session.apply(compute(2), 111.0).applied
    assert session.expected_wake_s == 130.0
    session.apply(compute(4), 112.0)
    assert session.expected_wake_s is None


def test_a_clock_that_goes_back_makes_no_negative_wait():
    session = make()
    session.apply(wait(1), 110.0)
    transition = session.apply(compute(2), 109.0)
    assert transition.waited == Waited("", None, 0.0)


def test_a_closed_session_takes_no_signal():
    session = make()
    session.apply(wait(1, "search"), 110.0)
    session.close(120.0)
    session.close(130.0)
    assert session.phase is Phase.CLOSED
    assert session.phase_since_s == 120.0
    assert session.tool_name == ""
    with pytest.raises(SessionClosedError, match="'a' is closed"):
        session.apply(compute(9), 140.0)


def test_what_the_worker_says_is_taken_and_forgotten():
    session = make()
    kv = Residency(3, 3, 0, 0, resident=True)
    session.observe(SessionSnapshot("a", 5, 48, kv, True, b"", 99.0))
    assert session.known
    assert (session.generation, session.context_length, session.kv) == (5, 48, kv)
    assert session.generating
    assert session.last_generate_s == 99.0
    session.observe(SessionSnapshot("a", 6, 50, kv, False, b"", None))
    assert session.last_generate_s == 99.0
    session.forget_place()
    place = (session.known, session.generation, session.context_length, session.kv)
    assert place == (False, 0, 0, NO_KV)
    assert session.phase is Phase.OPEN


# --- how long its client has been silent ---


def test_every_signal_is_a_sign_of_the_client_also_one_that_is_ignored():
    session = make()
    assert session.silent_since_s() == 100.0
    session.apply(compute(5), 200.0)
    assert session.silent_since_s() == 200.0
    assert not session.apply(compute(5), 300.0).applied
    assert session.silent_since_s() == 300.0


def test_a_generate_is_one_while_it_runs_and_at_its_end():
    session = make()
    session.observe(SessionSnapshot("a", 1, 0, NO_KV, True, b"", None))
    assert session.silent_since_s() is None
    session.observe(SessionSnapshot("a", 2, 0, NO_KV, False, b"", 400.0))
    assert session.silent_since_s() == 400.0


def test_a_tool_call_may_take_as_long_as_the_client_said():
    session = make()
    session.apply(wait(1, "build", 7200.0), 200.0)
    assert session.silent_since_s() == 7400.0
    session.apply(compute(2), 300.0)
    assert session.silent_since_s() == 300.0


def test_a_tool_call_may_take_any_time_while_the_client_is_there():
    session = make()
    session.stream = ClientStream()
    session.apply(wait(1), 200.0)
    assert session.silent_since_s() is None
    session.stream.ended_s = 5000.0
    assert session.silent_since_s() == 5000.0


def test_outside_a_tool_call_an_open_stream_is_no_sign():
    session = make()
    session.stream = ClientStream()
    session.apply(compute(1), 200.0)
    assert session.silent_since_s() == 200.0
