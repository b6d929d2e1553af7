from __future__ import annotations

import asyncio

import pytest

from djinn_client import DeadlineExceededError, ExhaustedError, RetryPolicy, UnavailableError
from djinn_client._retry import Backoff, Deadline


class Clock:
    """A clock that only pauses move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        self.pauses: list[float] = []
        monkeypatch.setattr("djinn_client._retry.time.monotonic", lambda: self.now)
        monkeypatch.setattr(asyncio, "sleep", self.sleep)

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


ERROR = UnavailableError("away")


async def test_pauses_grow_up_to_a_bound_and_jitter(clock: Clock) -> None:
    backoff = Backoff(RetryPolicy(give_up_s=1e9, initial_s=1, max_s=8, multiplier=2))
    for _ in range(6):
        await backoff.pause(ERROR)
    for pause, longest in zip(clock.pauses, [1, 2, 4, 8, 8, 8], strict=True):
        assert longest / 2 <= pause <= longest
    assert len({pause / bound for pause, bound in zip(clock.pauses[3:], [8] * 3, strict=True)}) > 1


async def test_it_gives_up_with_the_last_error(clock: Clock) -> None:
    backoff = Backoff(RetryPolicy(give_up_s=10, initial_s=4, max_s=4))

    async def try_forever() -> None:
        while True:
            await backoff.pause(ERROR)

    with pytest.raises(UnavailableError) as caught:
        await try_forever()
    assert caught.value is ERROR
    assert sum(clock.pauses) < 10


async def test_progress_starts_anew(clock: Clock) -> None:
    backoff = Backoff(RetryPolicy(give_up_s=10, initial_s=4, max_s=4))
    for _ in range(20):
        await backoff.pause(ERROR)
        backoff.progress()
    assert sum(clock.pauses) > 20


async def test_nothing_is_tried_again_with_no_time_to_give(clock: Clock) -> None:
    with pytest.raises(UnavailableError):
        await Backoff(RetryPolicy(give_up_s=0)).pause(ERROR)
    assert clock.pauses == []


async def test_the_server_may_ask_for_a_longer_pause(clock: Clock) -> None:
    backoff = Backoff(RetryPolicy(initial_s=1, max_s=1))
    await backoff.pause(ExhaustedError("full", retry_after_s=7))
    assert clock.pauses == [7]


async def test_a_deadline_cuts_a_pause_and_then_ends_it(clock: Clock) -> None:
    backoff = Backoff(RetryPolicy(initial_s=4, max_s=4), Deadline(3, "the thing"))
    await backoff.pause(ExhaustedError("full", retry_after_s=7))
    assert clock.pauses == [3]
    with pytest.raises(DeadlineExceededError, match="the thing was not done within 3 s"):
        await backoff.pause(ERROR)


def test_a_deadline_counts_down(clock: Clock) -> None:
    deadline = Deadline(3, "the thing")
    assert deadline.remaining_s() == 3
    assert deadline.remaining_s(2) == 2
    clock.now += 2.5
    assert deadline.remaining_s(2) == 0.5
    clock.now += 0.5
    with pytest.raises(DeadlineExceededError):
        deadline.remaining_s()


async def test_however_many_tries_the_pause_stays_bounded(clock: Clock) -> None:
    backoff = Backoff(RetryPolicy(give_up_s=1e9, initial_s=1, max_s=2, multiplier=2))
    for _ in range(1100):
        await backoff.pause(ERROR)
    assert 1 <= clock.pauses[-1] <= 2


async def test_a_missed_deadline_says_why_the_last_try_failed(clock: Clock) -> None:
    deadline = Deadline(3, "the thing")
    backoff = Backoff(RetryPolicy(initial_s=4, max_s=4), deadline)
    await backoff.pause(ERROR)
    clock.now += 3
    with pytest.raises(DeadlineExceededError, match=r"within 3 s.*away") as caught:
        deadline.remaining_s()
    assert caught.value.__cause__ is ERROR
    backoff.progress()
    assert deadline.error().__cause__ is None
