from __future__ import annotations

import asyncio
from typing import Any

import pytest

from services.scheduler import control
from services.scheduler.control import ControlLink
from services.scheduler.domain import Command, Evict, Restore
from services.scheduler.metrics import Metrics


class Stream:
    """The writing end of a call."""

    def __init__(self) -> None:
        self.written: list[Any] = []
        self.something = asyncio.Event()
        self.open = asyncio.Event()
        self.open.set()

    async def write(self, message) -> None:
        await self.open.wait()
        self.written.append(message)
        self.something.set()

    async def until(self, count: int) -> None:
        while len(self.written) < count:
            self.something.clear()
            await self.something.wait()


def command(number: int, action=None) -> Command:
    return Command(f"c{number}", "a", action or Evict())


@pytest.fixture
def link() -> ControlLink:
    return ControlLink(lambda: 100.5, Metrics())


async def test_messages_are_written_in_order_whenever_they_come(link):
    stream: Any = Stream()
    link.send(command(0), None)
    writer = asyncio.create_task(link.write(stream))
    link.send(command(1), None)
    await stream.until(2)
    link.send(command(2, Restore()), None)
    await stream.until(3)
    assert [message.command.command_id for message in stream.written] == ["c0", "c1", "c2"]
    link.close("over")
    await writer


async def test_the_time_from_the_signal_to_the_stream_is_measured():
    metrics = Metrics()
    link = ControlLink(lambda: 100.5, metrics)
    stream: Any = Stream()
    writer = asyncio.create_task(link.write(stream))
    link.send(command(0), 100.25)
    link.send(command(1, Restore()), None)
    await stream.until(2)
    link.close("over")
    await writer

    def sample(name: str, action: str) -> float | None:
        return metrics.registry.get_sample_value(name, {"action": action})

    seconds = "djinn_scheduler_signal_to_command_seconds"
    assert sample(f"{seconds}_count", "evict") == 1.0
    assert sample(f"{seconds}_sum", "evict") == 0.25
    assert sample(f"{seconds}_count", "restore") == 0.0
    assert sample("djinn_scheduler_commands_sent_total", "restore") == 1.0


async def test_closing_ends_the_writer_and_drops_what_waits(link):
    stream: Any = Stream()
    stream.open.clear()
    writer = asyncio.create_task(link.write(stream))
    for number in range(3):
        link.send(command(number), None)
    link.close("first")
    link.close("second")
    link.send(command(9), None)
    stream.open.set()
    await writer
    assert link.closed == "first"
    assert len(stream.written) <= 1


def test_a_worker_that_reads_nothing_is_given_up(link, monkeypatch):
    monkeypatch.setattr(control, "MAX_QUEUED", 10)
    for number in range(10):
        link.send(command(number), None)
    assert link.closed is None
    link.send(command(10), None)
    assert link.closed == "11 messages were not read"
