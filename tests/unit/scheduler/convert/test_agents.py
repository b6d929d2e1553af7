from __future__ import annotations

import pytest

from djinn.v1 import agent_service_pb2 as pb
from djinn.v1 import types_pb2 as types
from services.common.errors import InvalidRequestError
from services.scheduler.convert import agents as convert
from services.scheduler.convert.times import to_duration, to_timestamp
from services.scheduler.coordinator import OpenRequest
from services.scheduler.domain import Phase, Residency
from services.scheduler.session import Session, Signal


def test_an_opening_is_taken_as_it_is():
    request = pb.OpenSessionRequest(
        session_id="a",
        name="n",
        tenant_id="t",
        priority=-100,
        model="m",
        expected_prompt_tokens=5,
    )
    assert convert.open_request(request) == OpenRequest("a", "n", "t", -100, "m", 5)
    assert convert.open_request(pb.OpenSessionRequest()) == OpenRequest()


def test_a_signal_is_taken_as_it_is():
    request = pb.SignalPhaseRequest(
        session_id="a",
        phase=types.AGENT_PHASE_IO_WAIT,
        sequence=4,
        tool_name="search",
        expected_duration=to_duration(2.5),
    )
    assert convert.signal(request) == Signal(Phase.IO_WAIT, 4, "search", 2.5)
    request.ClearField("expected_duration")
    assert convert.signal(request).expected_s is None


def test_a_phase_that_cannot_be_signalled_is_named():
    request = pb.SignalPhaseRequest(session_id="a", phase=types.AGENT_PHASE_CLOSED, sequence=1)
    with pytest.raises(InvalidRequestError, match="AGENT_PHASE_CLOSED cannot be signalled"):
        convert.signal(request)
    request.phase = 42  # type: ignore[assignment]
    with pytest.raises(InvalidRequestError, match="phase: 42"):
        convert.signal(request)


@pytest.mark.parametrize("phase", list(Phase))
def test_phases_have_the_numbers_of_the_protocol(phase):
    value = convert.to_phase(phase)
    assert value == int(phase)
    assert types.AgentPhase.Name(value) == f"AGENT_PHASE_{phase.name}"
    assert convert.phase_filter(value) is phase


def test_no_phase_filters_nothing():
    assert convert.phase_filter(types.AGENT_PHASE_UNSPECIFIED) is None
    with pytest.raises(InvalidRequestError, match="phase"):
        convert.phase_filter(17)


def test_a_session_is_told_whole():
    session = Session("a", "t", "n", 3, "salt", "m", 100.5)
    session.apply(Signal(Phase.IO_WAIT, 2, "search"), 110.25)
    session.expected_wake_s = 120.0
    session.worker_id = "w0"
    session.generation = 6
    session.context_length = 50
    session.kv = Residency(4, 3, 2, 1, resident=True)
    message = convert.to_session(session, "h:1")
    assert message == types.Session(
        session_id="a",
        name="n",
        tenant_id="t",
        priority=3,
        phase=types.AGENT_PHASE_IO_WAIT,
        phase_sequence=2,
        open_time=to_timestamp(100.5),
        phase_time=to_timestamp(110.25),
        tool_name="search",
        expected_wake_time=to_timestamp(120.0),
        worker_id="w0",
        worker_endpoint="h:1",
        context_length=50,
        generation=6,
        kv=types.KvResidency(
            total_blocks=4, device_blocks=3, host_blocks=2, missing_tokens=1, resident=True
        ),
    )


def test_a_session_whose_worker_is_away_names_none():
    session = Session("a", "", "", 0, "", "", 100.0, worker_id="w0")
    message = convert.to_session(session, "")
    assert (message.worker_id, message.worker_endpoint) == ("", "")
    assert not message.HasField("expected_wake_time")
