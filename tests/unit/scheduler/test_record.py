from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.scheduler import record
from services.scheduler.domain import Phase
from services.scheduler.session import Session, Signal


def make(**fields) -> Session:
    return Session("a", "acme", "researcher", 7, "salt", "tiny", 100.25, **fields)


def test_a_session_comes_back_from_its_record():
    session = make()
    session.apply(Signal(Phase.IO_WAIT, 3, "search", 12.0), 110.5)
    session.expected_wake_s = 122.5
    told = record.decode(record.encode(session))
    assert told is not None
    revived = record.revive("a", told)
    revived.forecast = session.forecast
    assert revived == session


@given(st.binary(max_size=64))
def test_what_is_no_record_is_none(data):
    told = record.decode(data)
    assert told is None or told.version == record.VERSION


@pytest.mark.parametrize(
    "fields",
    [
        [2, 2, 1, 0.0, "", "", 0, "", "", 0.0],
        [1, 9, 1, 0.0, "", "", 0, "", "", 0.0],
        [1, 2, "1", 0.0, "", "", 0, "", "", 0.0],
        [1, 2],
    ],
)
def test_a_record_of_another_make_is_none(fields):
    assert record.decode(msgspec.msgpack.encode(fields)) is None


def test_a_record_with_fields_of_a_later_version_can_be_read():
    told = record.decode(record.encode(make()))
    assert told is not None
    later = [getattr(told, name) for name in told.__struct_fields__] + ["more"]
    assert record.decode(msgspec.msgpack.encode(later)) == told


def test_only_a_newer_record_changes_the_phase():
    session = make()
    session.apply(Signal(Phase.COMPUTE, 4), 110.0)
    other = make()
    other.apply(Signal(Phase.IO_WAIT, 4, "search"), 105.0)
    told = record.decode(record.encode(other))
    assert told is not None
    assert not record.merge(session, told)
    assert session.phase is Phase.COMPUTE
    other.apply(Signal(Phase.IO_WAIT, 5, "shell"), 120.0)
    told = record.decode(record.encode(other))
    assert told is not None
    assert record.merge(session, told)
    assert (session.phase, session.sequence, session.tool_name) == (Phase.IO_WAIT, 5, "shell")
    assert session.phase_since_s == 120.0


def test_no_record_opens_a_closed_session_again():
    session = make()
    session.close(120.0)
    other = make()
    other.apply(Signal(Phase.COMPUTE, 9), 130.0)
    told = record.decode(record.encode(other))
    assert told is not None
    assert not record.merge(session, told)
    assert session.phase is Phase.CLOSED
