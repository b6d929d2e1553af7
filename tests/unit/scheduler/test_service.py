from __future__ import annotations

import asyncio

from services.scheduler.service import WorkerArrivals


async def test_everybody_that_waits_is_woken_by_an_arrival():
    arrivals = WorkerArrivals()
    waiting = [asyncio.create_task(arrivals.wait(60.0)) for _ in range(3)]
    await asyncio.sleep(0)
    arrivals.notify()
    arrivals.notify()
    assert await asyncio.gather(*waiting) == [True, True, True]


async def test_waiting_ends_without_an_arrival():
    arrivals = WorkerArrivals()
    assert not await arrivals.wait(0.001)
    assert not await arrivals.wait(-1.0)
    arrivals.notify()


async def test_one_that_gives_up_is_forgotten():
    arrivals = WorkerArrivals()
    waiting = asyncio.create_task(arrivals.wait(60.0))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    arrivals.notify()
    assert not arrivals._waiting
