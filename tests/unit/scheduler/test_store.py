from __future__ import annotations

import pytest

from services.common.errors import SessionClosedError
from services.scheduler.domain import Phase
from services.scheduler.session import Session, Signal
from services.scheduler.store import SessionStore


def make(session_id="a", tenant="") -> Session:
    return Session(session_id, tenant, "", 0, "", "", 100.0)


@pytest.fixture
def store() -> SessionStore:
    return SessionStore(closed_kept=3, closed_ttl_s=60.0)


def test_sessions_are_counted_by_phase(store):
    for name in "abc":
        store.add(make(name))
    store.apply(store.get("a"), Signal(Phase.COMPUTE, 1), 101.0)
    store.apply(store.get("b"), Signal(Phase.IO_WAIT, 1), 101.0)
    store.apply(store.get("b"), Signal(Phase.IO_WAIT, 1), 101.0)
    assert [store.count(phase) for phase in Phase] == [1, 1, 1, 0]
    store.close("b", 102.0)
    assert [store.count(phase) for phase in Phase] == [1, 1, 0, 0]
    assert len(store) == 2


def test_a_closed_session_is_remembered_for_a_while(store):
    session = make()
    store.add(session)
    assert store.close("a", 100.0) is session
    assert store.close("a", 130.0) is None
    assert store.get("a") is None
    assert store.is_closed("a")
    with pytest.raises(SessionClosedError):
        store.apply(session, Signal(Phase.COMPUTE, 1), 101.0)
    store.forget_closed(159.0)
    assert store.is_closed("a")
    store.forget_closed(160.0)
    assert not store.is_closed("a")


def test_an_unknown_session_can_be_closed_too(store):
    assert store.close("never", 100.0) is None
    assert store.is_closed("never")


def test_only_so_many_closed_sessions_are_remembered(store):
    for name in "abcde":
        store.close(name, 100.0)
    assert [name for name in "abcde" if store.is_closed(name)] == ["c", "d", "e"]


def test_pages_are_in_order_and_complete(store):
    for number in (7, 3, 9, 1, 5):
        store.add(make(f"s{number}"))
    first, more = store.page("", 2, None, None)
    assert [session.session_id for session in first] == ["s1", "s3"]
    assert more
    second, more = store.page("s3", 3, None, None)
    assert [session.session_id for session in second] == ["s5", "s7", "s9"]
    assert not more
    assert store.page("s9", 2, None, None) == ([], False)


def test_pages_can_be_of_one_tenant_or_phase(store):
    store.add(make("a", "acme"))
    store.add(make("b", "acme"))
    store.add(make("c", ""))
    store.apply(store.get("b"), Signal(Phase.COMPUTE, 1), 101.0)
    assert [s.session_id for s in store.page("", 10, "acme", None)[0]] == ["a", "b"]
    assert [s.session_id for s in store.page("", 10, "", None)[0]] == ["c"]
    assert [s.session_id for s in store.page("", 10, None, Phase.COMPUTE)[0]] == ["b"]
    assert [s.session_id for s in store.page("", 10, "acme", Phase.OPEN)[0]] == ["a"]
