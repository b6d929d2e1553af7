"""AgentService: requests in, checked on the way; sessions out."""

from __future__ import annotations

from djinn.v1 import agent_service_pb2 as agent_pb
from djinn.v1 import types_pb2 as types_pb
from services.common.errors import InvalidRequestError
from services.common.session_token import check_session_id
from services.scheduler.convert.times import to_seconds, to_timestamp
from services.scheduler.coordinator import OpenRequest
from services.scheduler.domain import Phase
from services.scheduler.session import Session, Signal

MAX_NAME = 256
MAX_PRIORITY = 100
# Longer than any tool call: keeps times within what a Timestamp can say.
MAX_EXPECTED_S = 366 * 86_400.0

_SIGNALS = {
    types_pb.AGENT_PHASE_COMPUTE: Phase.COMPUTE,
    types_pb.AGENT_PHASE_IO_WAIT: Phase.IO_WAIT,
}


def open_request(request: agent_pb.OpenSessionRequest) -> OpenRequest:
    """Returns what OpenSession asks for.

    Raises:
        InvalidRequestError: A field is out of range; names it.
    """
    session_id = check_session_id(request.session_id) if request.HasField("session_id") else None
    if not -MAX_PRIORITY <= request.priority <= MAX_PRIORITY:
        raise InvalidRequestError.of_field(
            "priority", f"{request.priority} is not from -{MAX_PRIORITY} to {MAX_PRIORITY}"
        )
    if request.expected_prompt_tokens < 0:
        raise InvalidRequestError.of_field(
            "expected_prompt_tokens", f"{request.expected_prompt_tokens} is below 0"
        )
    return OpenRequest(
        session_id=session_id,
        name=_short("name", request.name),
        tenant_id=_short("tenant_id", request.tenant_id),
        priority=request.priority,
        model=_short("model", request.model),
        expected_tokens=request.expected_prompt_tokens,
    )


def signal(request: agent_pb.SignalPhaseRequest) -> Signal:
    """Returns the signal in a request.

    Raises:
        InvalidRequestError: A field is out of range; names it.
    """
    check_session_id(request.session_id)
    phase = _SIGNALS.get(request.phase)
    if phase is None:
        raise InvalidRequestError.of_field(
            "phase",
            f"{_phase_name(request.phase)} cannot be signalled; "
            "AGENT_PHASE_COMPUTE and AGENT_PHASE_IO_WAIT can",
        )
    if request.sequence < 1:
        raise InvalidRequestError.of_field("sequence", f"{request.sequence} is below 1")
    expected_s = None
    if request.HasField("expected_duration"):
        expected_s = to_seconds(request.expected_duration)
        if not 0 < expected_s <= MAX_EXPECTED_S:
            raise InvalidRequestError.of_field(
                "expected_duration",
                f"{expected_s:g} s is not above 0 and at most {MAX_EXPECTED_S:g} s",
            )
    return Signal(phase, request.sequence, _short("tool_name", request.tool_name), expected_s)


def phase_filter(value: int) -> Phase | None:
    """Returns the phase to list; None for all.

    Raises:
        InvalidRequestError: There is no such phase.
    """
    if value == types_pb.AGENT_PHASE_UNSPECIFIED:
        return None
    try:
        return Phase(value)
    except ValueError:
        raise InvalidRequestError.of_field("phase", f"{value} is no phase") from None


def to_phase(phase: Phase) -> types_pb.AgentPhase.ValueType:
    """Returns a phase as the protocol names it."""
    return _TO_PHASE[phase]


_TO_PHASE: dict[Phase, types_pb.AgentPhase.ValueType] = {
    Phase.OPEN: types_pb.AGENT_PHASE_OPEN,
    Phase.COMPUTE: types_pb.AGENT_PHASE_COMPUTE,
    Phase.IO_WAIT: types_pb.AGENT_PHASE_IO_WAIT,
    Phase.CLOSED: types_pb.AGENT_PHASE_CLOSED,
}


def to_session(session: Session, endpoint: str, expire_s: float | None = None) -> types_pb.Session:
    """Returns a session for clients.

    Args:
        session: The session.
        endpoint: Its worker's; empty: it is not connected.
        expire_s: When it ends if nothing is heard of it; None: it does not.
    """
    message = types_pb.Session(
        session_id=session.session_id,
        name=session.name,
        tenant_id=session.tenant_id,
        priority=session.priority,
        phase=to_phase(session.phase),
        phase_sequence=session.sequence,
        open_time=to_timestamp(session.opened_s),
        phase_time=to_timestamp(session.phase_since_s),
        tool_name=session.tool_name,
        worker_id=session.worker_id if endpoint else "",
        worker_endpoint=endpoint,
        context_length=session.context_length,
        generation=session.generation,
        kv=types_pb.KvResidency(**session.kv._asdict()),
    )
    if session.expected_wake_s is not None:
        message.expected_wake_time.CopyFrom(to_timestamp(session.expected_wake_s))
    if expire_s is not None:
        message.expire_time.CopyFrom(to_timestamp(expire_s))
    return message


def _short(field: str, text: str) -> str:
    if len(text) > MAX_NAME:
        raise InvalidRequestError.of_field(
            field, f"{len(text)} characters, at most {MAX_NAME} are allowed"
        )
    return text


def _phase_name(value: types_pb.AgentPhase.ValueType) -> str:
    try:
        return types_pb.AgentPhase.Name(value)
    except ValueError:
        return str(value)
