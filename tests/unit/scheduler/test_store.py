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


def test_sessions_are_counted_by_tenant(store):
    for name, tenant in (("a", "acme"), ("b", "acme"), ("c", "")):
        store.add(make(name, tenant))
    assert [store.count_tenant(tenant) for tenant in ("acme", "", "nobody")] == [2, 1, 0]
    store.close("a", 101.0)
    store.close("c", 101.0)
    assert [store.count_tenant(tenant) for tenant in ("acme", "")] == [1, 0]


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


# --- expiry ---


def expiring(ttl_s=50.0, start_s=0.0) -> SessionStore:
    return SessionStore(3, 60.0, ttl_s, start_s)


def added(store, session_id="a") -> Session:
    session = make(session_id)
    store.add(session)
    return session


def expire(store, now_s) -> list[str]:
    ended = []
    for session in store.take_expired(now_s):
        store.close(session.session_id, now_s, expired=True)
        ended.append(session.session_id)
    return ended


def test_a_silent_session_expires_once_and_says_so():
    store = expiring()
    session = added(store)
    assert store.expire_s(session) == 150.0
    assert expire(store, 149.9) == []
    assert expire(store, 150.0) == ["a"]
    assert expire(store, 1e9) == []
    assert store.expired == 1
    error = store.closed_error("a")
    assert "EXPIRED" in error.message
    assert "50 s" in error.message
    assert error.metadata["cause"] == "EXPIRED"


def test_one_that_was_closed_has_not_expired():
    store = expiring()
    added(store)
    store.close("a", 120.0)
    assert expire(store, 150.0) == []
    assert store.expired == 0
    assert "EXPIRED" not in store.closed_error("a").message


def test_whoever_is_heard_of_lasts_longer():
    store = expiring()
    store.apply(added(store), Signal(Phase.COMPUTE, 1), 140.0)
    assert expire(store, 189.9) == []
    assert expire(store, 190.0) == ["a"]


def test_one_that_generates_is_looked_at_again():
    store = expiring()
    session = added(store)
    session.generating = True
    assert store.expire_s(session) is None
    assert expire(store, 1000.0) == []
    session.generating, session.last_generate_s = False, 1001.0
    assert expire(store, 1050.9) == []
    # Found at the next look, a tenth of the time later at most.
    assert expire(store, 1056.0) == ["a"]


def test_silence_counts_from_the_schedulers_own_start():
    store = expiring(start_s=1000.0)
    assert store.expire_s(added(store)) == 1050.0
    assert expire(store, 1049.9) == []
    assert expire(store, 1050.0) == ["a"]


def test_without_a_lifetime_nothing_expires(store):
    assert store.expire_s(added(store)) is None
    assert expire(store, 1e12) == []
