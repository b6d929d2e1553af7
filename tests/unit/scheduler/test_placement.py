from __future__ import annotations

import pytest

from services.common.errors import NoWorkerError, UnsupportedError
from services.scheduler.domain import PoolState
from services.scheduler.placement import candidates, expected_blocks, roomiest
from services.scheduler.policy.view import WorkerView


def worker(worker_id="w", free=100, host_free=100, model="tiny", **fields) -> WorkerView:
    return WorkerView(
        worker_id=worker_id,
        model=model,
        draining=fields.pop("draining", False),
        block_bytes=1024,
        block_size_tokens=16,
        device=PoolState(total=100, free=free, used=100 - free),
        host=PoolState(total=100, free=host_free, used=100 - host_free),
        **fields,
    )


def test_the_most_free_capacity_wins():
    workers = [worker("a", free=20), worker("b", free=50), worker("c", free=30)]
    assert roomiest(workers).worker_id == "b"


def test_what_may_be_reused_is_free():
    reclaiming = WorkerView(
        "b", "tiny", False, 1024, 16, PoolState(100, 10, 0, 90), PoolState(100, 100)
    )
    assert roomiest([worker("a", free=50), reclaiming]).worker_id == "b"


def test_room_on_the_device_goes_before_more_room_on_the_host():
    workers = [worker("a", free=1, host_free=100), worker("b", free=60, host_free=0)]
    assert roomiest(workers, expected_tokens=320).worker_id == "b"


def test_sessions_placed_since_the_last_report_count():
    workers = [worker("a", free=60, unreported_blocks=30), worker("b", free=50)]
    assert roomiest(workers).worker_id == "b"


def test_of_equals_the_one_with_fewer_sessions_then_the_first():
    assert roomiest([worker("b", sessions=2), worker("a", sessions=3)]).worker_id == "b"
    assert roomiest([worker("b"), worker("a")]).worker_id == "a"


def test_only_workers_of_the_model_are_asked():
    workers = [worker("a", free=90), worker("b", free=10, model="large")]
    assert [found.worker_id for found in candidates(workers, "large")] == ["b"]
    with pytest.raises(UnsupportedError, match="model 'huge'; those connected serve large, tiny"):
        candidates(workers, "huge")


def test_a_model_whose_worker_may_come_back_is_worth_another_try():
    with pytest.raises(NoWorkerError) as caught:
        candidates([worker("a")], "huge", lost_models={"huge"})
    assert caught.value.retry_after_s == 1.0


def test_nothing_is_placed_on_a_draining_worker():
    workers = [worker("a", draining=True), worker("b", free=1)]
    assert [found.worker_id for found in candidates(workers, "")] == ["b"]
    with pytest.raises(NoWorkerError, match="draining"):
        candidates([worker("a", draining=True)], "")


def test_without_workers_the_error_says_when_to_retry():
    with pytest.raises(NoWorkerError, match="no worker is connected") as caught:
        candidates([], "")
    assert caught.value.retry_after_s == 1.0


def test_a_session_without_an_estimate_is_taken_for_the_average():
    assert expected_blocks(worker(), 33) == 3
    assert expected_blocks(worker(free=20, host_free=90, sessions=9), 0) == 10
    assert expected_blocks(worker(), 0) == 1
