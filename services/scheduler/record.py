"""The record of a session that its worker keeps for the scheduler and does not look inside.

A scheduler that lost its state reads it back from the workers' snapshots.
"""

from __future__ import annotations

from typing import Final

import msgspec

from services.scheduler.domain import Phase
from services.scheduler.session import Session

VERSION: Final = 1


class Record(msgspec.Struct, frozen=True, array_like=True):
    """What the scheduler must know again after a restart; sent as a msgpack array.

    Fields are only ever added at the end, with a default.
    """

    version: int
    phase: int
    sequence: int
    phase_since_s: float
    tenant_id: str
    name: str
    priority: int
    cache_salt: str
    model: str
    opened_s: float
    tool_name: str = ""
    expected_s: float | None = None
    expected_wake_s: float | None = None


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Record)


def encode(session: Session) -> bytes:
    """Returns the session's record."""
    return _encoder.encode(
        Record(
            version=VERSION,
            phase=int(session.phase),
            sequence=session.sequence,
            phase_since_s=session.phase_since_s,
            tenant_id=session.tenant_id,
            name=session.name,
            priority=session.priority,
            cache_salt=session.cache_salt,
            model=session.model,
            opened_s=session.opened_s,
            tool_name=session.tool_name,
            expected_s=session.expected_s,
            expected_wake_s=session.expected_wake_s,
        )
    )


def decode(data: bytes) -> Record | None:
    """Returns the record in `data`; None if there is none that this version can read."""
    try:
        record = _decoder.decode(data)
    except msgspec.MsgspecError:
        return None
    known = {int(phase) for phase in Phase}
    return record if record.version == VERSION and record.phase in known else None


def revive(session_id: str, record: Record) -> Session:
    """Returns the session that a record describes, placed nowhere."""
    return Session(
        session_id=session_id,
        tenant_id=record.tenant_id,
        name=record.name,
        priority=record.priority,
        cache_salt=record.cache_salt,
        model=record.model,
        opened_s=record.opened_s,
        phase=Phase(record.phase),
        sequence=record.sequence,
        phase_since_s=record.phase_since_s,
        tool_name=record.tool_name,
        expected_s=record.expected_s,
        expected_wake_s=record.expected_wake_s,
    )


def merge(session: Session, record: Record) -> bool:
    """Takes the record's phase if it is newer than the session's.

    Returns:
        Whether it was.
    """
    if record.sequence <= session.sequence or session.phase is Phase.CLOSED:
        return False
    session.phase = Phase(record.phase)
    session.sequence = record.sequence
    session.phase_since_s = session.signalled_s = record.phase_since_s
    session.tool_name = record.tool_name
    session.expected_s = record.expected_s
    session.expected_wake_s = record.expected_wake_s
    return True
