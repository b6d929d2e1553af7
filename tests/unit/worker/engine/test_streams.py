"""Threads that stand in for CUDA streams."""

from __future__ import annotations

import select
import threading

import pytest

from services.worker.engine.streams import CpuStream, Wakeup


def test_work_is_done_in_order_and_its_event_wakes_a_poll() -> None:
    wakeup = Wakeup()
    stream = CpuStream("test", wakeup)
    done: list[int] = []
    for number in range(5):
        stream.launch(lambda number=number: done.append(number))  # type: ignore[misc]
    event = stream.record()
    assert select.select([wakeup.fileno()], [], [], 10)[0]
    assert event.query()
    assert done == [0, 1, 2, 3, 4]
    wakeup.clear()
    wakeup.clear()
    assert not select.select([wakeup.fileno()], [], [], 0)[0]
    stream.close()


def test_a_stream_waits_for_another_s_event_and_its_caller_does_not() -> None:
    wakeup = Wakeup()
    first, second = CpuStream("first", wakeup), CpuStream("second", wakeup)
    gate = threading.Event()
    order: list[str] = []

    def slow() -> None:
        gate.wait()
        order.append("first")

    first.launch(slow)
    second.wait(first.record())
    second.launch(lambda: order.append("second"))
    after = second.record()
    assert not after.query()
    gate.set()
    after.synchronize()
    assert order == ["first", "second"]
    first.close()
    second.close()


def test_a_failure_reaches_every_later_event_and_nothing_more_is_done() -> None:
    stream = CpuStream("test", Wakeup())
    before = stream.record()

    def fail() -> None:
        raise ZeroDivisionError

    stream.launch(fail)
    done: list[int] = []
    stream.launch(lambda: done.append(1))
    event = stream.record()
    stream.close()
    assert before.query()
    for ask in (event.query, event.synchronize):
        with pytest.raises(ZeroDivisionError):
            ask()
    assert done == []
