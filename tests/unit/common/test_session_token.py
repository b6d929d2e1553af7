from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import InvalidRequestError
from services.common.session_token import MAX_TOKEN_BYTES, SessionToken, check_session_id

IDS = st.from_regex(r"[A-Za-z0-9._:-]{1,128}", fullmatch=True)
TEXT = st.text(max_size=50)


@given(
    token=st.builds(
        SessionToken,
        session_id=IDS,
        tenant_id=TEXT,
        cache_salt=TEXT,
        priority=st.integers(-100, 100),
        name=TEXT,
        worker_id=TEXT,
        opened_unix_ns=st.integers(0, 2**63 - 1),
    )
)
def test_a_token_comes_back_as_it_went(token: SessionToken) -> None:
    assert SessionToken.decode(token.encode()) == token


def test_a_token_is_json_an_operator_can_read() -> None:
    assert json.loads(SessionToken("s-1", tenant_id="acme").encode())["tenant_id"] == "acme"


def test_fields_of_a_newer_version_are_skipped() -> None:
    assert SessionToken.decode(b'{"session_id": "s-1", "shoe_size": 43}') == SessionToken("s-1")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"garbage",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b'{"session_id": 7}',
        b'{"session_id": "a b"}',
        b'{"session_id": "s-1", "priority": "high"}',
        b'{"session_id": "s-1"',
        b'{"session_id":"' + b"a" * MAX_TOKEN_BYTES + b'"}',
    ],
)
def test_what_is_no_token_is_refused_by_name(data: bytes) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SessionToken.decode(data)
    assert caught.value.metadata == {"field": "session_token"}
    assert "\n" not in caught.value.message


@given(data=st.binary(max_size=200))
def test_any_bytes_are_a_token_or_refused(data: bytes) -> None:
    try:
        token = SessionToken.decode(data)
    except InvalidRequestError:
        return
    assert check_session_id(token.session_id) == token.session_id


@given(session_id=IDS)
def test_a_good_session_id_is_returned(session_id: str) -> None:
    assert check_session_id(session_id) == session_id


@pytest.mark.parametrize("session_id", ["", "a b", "ä", "a\n", "a/b", "x" * 129, "٣"])
def test_a_bad_session_id_is_refused_with_the_rule(session_id: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"1 to 128 characters") as caught:
        check_session_id(session_id)
    assert caught.value.metadata["field"] == "session_id"
    assert len(caught.value.message) < 200
