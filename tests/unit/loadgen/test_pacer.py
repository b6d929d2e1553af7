import asyncio
import select
import time

from loadgen import pacer
from loadgen.pacer import LagProbe, RunClock, due_agents
from loadgen.workload import AgentPlan


class HandClock(RunClock):
    """A clock that sleeping moves on, at once."""

    def __init__(self):
        super().__init__(0)
        self.time_s = 0.0
        self.slept = []

    def now(self):
        return self.time_s

    async def sleep_until(self, due_s):
        self.slept.append(due_s)
        self.time_s = max(self.time_s, due_s)


def plans(*arrivals):
    return [AgentPlan(i, f"a{i}", arrival, ()) for i, arrival in enumerate(arrivals)]


async def test_agents_come_when_they_are_due_in_order():
    clock = HandClock()
    seen = [(p.arrival_s, clock.now()) async for p in due_agents(plans(3.0, 1.0, 2.0), clock)]
    assert seen == [(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)]


async def test_whoever_is_late_is_late_alone():
    clock = HandClock()
    seen = []
    async for plan in due_agents(plans(1.0, 2.0, 9.0), clock):
        seen.append(clock.now())
        if plan.arrival_s == 1.0:
            clock.time_s = 5.0
    assert seen == [1.0, 5.0, 9.0]


async def test_the_clock_counts_from_its_start():
    clock = RunClock(time.monotonic_ns() - 5_000_000_000)
    assert 5.0 <= clock.now() < 65.0
    await clock.sleep_until(1.0)


async def test_sleeping_ends_no_earlier_than_due():
    clock = RunClock(time.monotonic_ns())
    await clock.sleep_until(0.02)
    assert clock.now() >= 0.02


async def test_a_blocked_loop_shows_in_every_sample_that_fell_due_meanwhile():
    probe = LagProbe(3, interval_s=0.001)
    probe.start()
    blocked_until = time.monotonic() + 0.05
    while time.monotonic() < blocked_until:
        pass
    # The next look at the timer finds all that fell due: one turn of the loop polls it, and the
    # one after that has run what was found.
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    lag = probe.stop()
    assert lag.process == 3
    assert lag.samples >= 50
    # 50 samples fell due while the loop was blocked, evenly late between 0 and 50 ms.
    assert lag.max_ms >= 45
    assert lag.p50_ms <= lag.p99_ms <= lag.max_ms


async def test_a_stopped_probe_takes_no_samples():
    probe = LagProbe(0, interval_s=0.001)
    probe.start()
    assert probe._timer is not None
    # The timer has expired, and nothing has looked at it yet.
    select.select([probe._timer], [], [])
    before = probe.stop().samples
    for _ in range(3):
        await asyncio.sleep(0)
    assert probe.stop().samples == before


async def test_how_often_others_were_let_in_is_counted(monkeypatch):
    counts = iter([5, 9])
    monkeypatch.setattr(pacer, "_preemptions", lambda: next(counts))
    probe = LagProbe(0, interval_s=0.001)
    probe.start()
    assert probe._timer is not None
    select.select([probe._timer], [], [])
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert probe.stop().preemptions == 4
