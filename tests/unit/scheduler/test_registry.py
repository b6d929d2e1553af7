from __future__ import annotations

import pytest

from services.common.errors import UnknownWorkerError
from services.scheduler.domain import Capacity, Counters, Hello, ModelInfo, PoolState, Report
from services.scheduler.registry import Registry


class Link:
    def __init__(self) -> None:
        self.closed: str | None = None

    def send(self, command, caused_s):
        raise AssertionError("nothing is sent here")

    def close(self, reason):
        self.closed = reason


def hello(worker_id="w0", incarnation="1", **fields) -> Hello:
    return Hello(worker_id, incarnation, "h:1", ModelInfo("tiny"), Capacity(100, 400), **fields)


def report(stores=0, free=60) -> Report:
    return Report(
        device=PoolState(100, free, 100 - free),
        host=PoolState(400, 400),
        counters=Counters(stores=stores, stored_bytes=10 * stores),
    )


@pytest.fixture
def registry() -> Registry:
    return Registry()


def test_a_worker_without_a_report_counts_as_empty(registry):
    registry.connect(hello(), Link(), 100.0)
    view = registry.views["w0"]
    assert view.device == PoolState(100, 100)
    assert view.host == PoolState(400, 400)
    assert view.model == "tiny"


def test_views_follow_reports_and_placements(registry):
    worker, _ = registry.connect(hello(), Link(), 100.0)
    registry.report(worker, report(free=60))
    registry.assign(worker, "a", 5)
    registry.assign(worker, "b", 7)
    registry.unassign("w0", "b")
    view = registry.views["w0"]
    assert (view.device.free, view.sessions, view.unreported_blocks) == (60, 1, 12)
    registry.report(worker, report(free=50))
    view = registry.views["w0"]
    assert (view.device.free, view.sessions, view.unreported_blocks) == (50, 1, 0)


def test_a_new_stream_replaces_the_old_one(registry):
    old, new = Link(), Link()
    registry.connect(hello(), old, 100.0)
    worker, same = registry.connect(hello(), new, 101.0)
    assert same
    assert worker.link is new
    assert old.closed is not None
    assert "replaced" in old.closed
    assert registry.lose("w0", old, 102.0) is None
    assert registry.connected("w0") is worker
    assert registry.lose("w0", new, 103.0) is worker
    assert registry.connected("w0") is None
    assert registry.get("w0") is worker
    assert not registry.views
    assert worker.lost_s == 103.0


def test_counters_of_processes_that_ended_stay_counted(registry):
    worker, same = registry.connect(hello(incarnation="1"), Link(), 100.0)
    assert not same
    registry.report(worker, report(stores=5))
    worker, same = registry.connect(hello(incarnation="2"), Link(), 101.0)
    assert not same
    assert worker.report is None
    assert registry.totals().stores == 5
    registry.report(worker, report(stores=2))
    other, _ = registry.connect(hello("w1"), Link(), 101.0)
    registry.report(other, report(stores=10))
    assert registry.totals() == Counters(stores=17, stored_bytes=170)


def test_reconnecting_of_one_process_counts_nothing_twice(registry):
    worker, _ = registry.connect(hello(), Link(), 100.0)
    registry.report(worker, report(stores=5))
    link = Link()
    registry.connect(hello(), link, 101.0)
    assert registry.totals().stores == 5
    registry.lose("w0", link, 102.0)
    assert registry.totals().stores == 5


def test_lost_workers_are_forgotten_but_not_what_they_did(registry):
    link = Link()
    worker, _ = registry.connect(hello(), link, 100.0)
    registry.report(worker, report(stores=5))
    registry.assign(worker, "a")
    registry.lose("w0", link, 110.0)
    registry.forget_lost(111.0)
    assert registry.get("w0") is worker
    registry.unassign("w0", "a")
    registry.forget_lost(110.0)
    assert registry.get("w0") is worker
    registry.forget_lost(111.0)
    assert registry.get("w0") is None
    assert registry.totals().stores == 5


def test_pools_are_added_up_over_connected_workers(registry):
    link = Link()
    worker, _ = registry.connect(hello("w0"), link, 100.0)
    registry.report(worker, report(free=60))
    registry.connect(hello("w1"), Link(), 100.0)
    assert registry.pools() == (PoolState(200, 160, 40), PoolState(800, 800))
    registry.lose("w0", link, 101.0)
    assert registry.pools() == (PoolState(100, 100), PoolState(400, 400))


def test_a_worker_drains_by_its_own_word_or_an_operators(registry):
    worker, _ = registry.connect(hello(draining=True), Link(), 100.0)
    assert registry.views["w0"].draining
    worker, _ = registry.connect(hello(draining=False), Link(), 101.0)
    assert not registry.views["w0"].draining
    worker.drained = True
    registry.changed(worker)
    assert registry.views["w0"].draining


def test_an_unknown_worker_cannot_be_required(registry):
    with pytest.raises(UnknownWorkerError, match="'w9'"):
        registry.require("w9")


def test_sums_of_nothing_are_zero():
    assert Counters.sum([]) == Counters()
    assert PoolState.sum([]) == PoolState()


def test_the_report_time_is_that_of_the_worker_that_was_silent_for_longest(registry):
    assert registry.report_time_s() is None
    link = Link()
    first, _ = registry.connect(hello("w0"), link, 100.0)
    second, _ = registry.connect(hello("w1"), Link(), 100.0)
    registry.report(first, report())
    assert registry.report_time_s() is None
    second.heard_s = 101.0
    registry.report(second, report())
    assert registry.report_time_s() == 100.0
    # Other messages are no reports.
    first.heard_s = 103.0
    assert registry.report_time_s() == 100.0
    registry.report(first, report())
    assert registry.report_time_s() == 101.0
    # Whoever is lost will not report.
    registry.lose("w1", second.link, 104.0)
    assert registry.report_time_s() == 103.0
