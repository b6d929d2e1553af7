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


def speeds(prefill, recomputed=0, free=60) -> Report:
    return Report(
        device=PoolState(100, free, 100 - free),
        counters=Counters(recomputed_tokens=recomputed),
        prefill_tokens_per_s=prefill,
    )


def test_the_best_prefill_speed_of_late_counts(registry):
    worker, _ = registry.connect(hello(), Link(), 100.0)
    for second, speed in enumerate((10_000.0, 40_000.0, 2_000.0, 3_000.0)):
        worker.heard_s = 100.0 + second
        registry.report(worker, speeds(speed))
    assert registry.views["w0"].prefill_tokens_per_s == pytest.approx(40_000, rel=0.01)
    worker.heard_s = 10_000.0
    registry.report(worker, speeds(3_000.0))
    assert registry.views["w0"].prefill_tokens_per_s == 3_000


def test_the_share_of_time_that_recomputes_rises_and_falls(registry):
    worker, _ = registry.connect(hello(), Link(), 100.0)
    shares = []
    for second in range(60):
        worker.heard_s = 100.0 + second
        registry.report(worker, speeds(1000.0, recomputed=800 * min(second, 30)))
        shares.append(registry.views["w0"].recompute_share)
    assert shares[0] == 0.0
    assert shares[30] == pytest.approx(0.8, abs=0.05)
    assert shares[59] < 0.01


def test_when_a_worker_was_last_full_is_known(registry):
    worker, _ = registry.connect(hello(), Link(), 100.0)
    for now_s, free in ((100.0, 60), (101.0, 1), (102.0, 0), (103.0, 2)):
        worker.heard_s = now_s
        registry.report(worker, speeds(0.0, free=free))
    assert registry.views["w0"].full_s == 102.0
    registry.connect(hello(incarnation="2"), Link(), 104.0)
    assert registry.views["w0"].full_s is None


def test_sessions_placed_since_the_last_report_are_counted_once(registry):
    worker, _ = registry.connect(hello(), Link(), 100.0)
    registry.assign(worker, "a")
    registry.assign(worker, "a")
    registry.assign(worker, "b")
    assert registry.views["w0"].opened == 2
    registry.report(worker, report())
    assert registry.views["w0"].opened == 0
