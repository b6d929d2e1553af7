from __future__ import annotations

from services.worker.front.session_log import SessionLog, SessionLogs


def test_the_last_token_follows_a_generation() -> None:
    log = SessionLog()
    assert log.last_token() is None
    log.begin(3, 7)
    assert (log.length, log.last_token()) == (3, 7)
    log.extend([8, 9])
    assert (log.length, log.last_token()) == (5, 9)
    log.cut(4)
    assert (log.length, log.last_token()) == (4, 8)


def test_a_token_that_was_never_seen_is_not_known() -> None:
    log = SessionLog()
    log.begin(3, None)
    assert log.last_token() is None
    log.extend([4])
    assert log.last_token() == 4
    log.cut(9)
    assert log.last_token() is None
    log.cut(1)
    assert log.last_token() is None


def test_a_forgotten_session_begins_anew() -> None:
    logs = SessionLogs()
    logs.ensure("s").begin(3, 7)
    assert logs.ensure("s") is logs.get("s")
    logs.forget("s")
    logs.forget("s")
    assert logs.get("s") is None
    assert len(logs) == 0
