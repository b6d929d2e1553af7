from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from hypothesis import given
from hypothesis import strategies as st

from djinn.v1 import control_service_pb2 as pb
from services.worker import messages
from services.worker.front import control_client as module
from services.worker.front.control_client import Backoff, ControlClient
from services.worker.front.convert.control import WorkerIdentity
from tests.support.fake_scheduler import FakeScheduler, WorkerStream
from tests.support.stand_ins import MODEL, command_done, report, session_state

FAST = Backoff(first_s=0.001, max_s=0.01)
EVICT: dict[str, Any] = {"evict": pb.EvictAction()}


class Bench:
    """A control client between a fake scheduler and an engine that is this test."""

    def __init__(self, address: str) -> None:
        self.commands: asyncio.Queue[messages.Command] = asyncio.Queue()
        self.modes: list[messages.Mode] = []
        self.over: list[tuple[messages.Command, str, messages.CommandDone]] = []
        self.sessions = [session_state("a")]
        self.answer_snapshots = True
        self.events_before_snapshot: list[messages.SessionEvent] = []
        identity = WorkerIdentity("w", "incarnation", "host:1", "host:2")
        self.client = ControlClient(
            address, identity, MODEL, self.send, lambda *over: self.over.append(over), FAST
        )

    def send(self, message: messages.ToEngine) -> None:
        if isinstance(message, messages.Command):
            self.commands.put_nowait(message)
        elif isinstance(message, messages.SetMode):
            self.modes.append(message.mode)
        elif isinstance(message, messages.GetSnapshot) and self.answer_snapshots:
            for event in self.events_before_snapshot:
                self.client.on_session_event(event)
            snapshot = messages.Snapshot(message.snapshot_id, list(self.sessions))
            asyncio.get_running_loop().call_soon(self.client.on_snapshot, snapshot)
            asyncio.get_running_loop().call_soon(self.client.on_session_event, event_of("later"))


def event_of(session_id: str) -> messages.SessionEvent:
    kind = messages.SessionEventKind.GENERATE_FINISHED
    return messages.SessionEvent(kind, session_state(session_id), 5)


@contextlib.asynccontextmanager
async def running(client: ControlClient) -> AsyncIterator[None]:
    task = asyncio.create_task(client.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
async def scheduler() -> AsyncIterator[tuple[FakeScheduler, int]]:
    fake = FakeScheduler()
    async with fake.serving() as port:
        yield fake, port


@pytest.fixture
async def bench(scheduler: tuple[FakeScheduler, int]) -> AsyncIterator[Bench]:
    bench = Bench(f"127.0.0.1:{scheduler[1]}")
    async with running(bench.client):
        yield bench


@pytest.fixture
async def stream(bench: Bench, scheduler: tuple[FakeScheduler, int]) -> WorkerStream:
    stream = await scheduler[0].streams.get()
    stream.welcome()
    return stream


async def test_hello_comes_first_with_a_snapshot_and_later_events_behind_it(
    bench: Bench, scheduler: tuple[FakeScheduler, int]
) -> None:
    bench.events_before_snapshot = [event_of("earlier")]
    stream = await scheduler[0].streams.get()
    first = await stream.received.get()
    assert first.hello.worker_id == "w"
    assert [session.session_id for session in first.hello.snapshot] == ["a"]
    assert not bench.client.connected
    stream.welcome()
    second = await stream.received.get()
    assert second.session_event.session.session_id == "later"
    assert bench.client.connected


async def test_a_command_is_acknowledged_done_and_answered(
    bench: Bench, stream: WorkerStream
) -> None:
    stream.command(traceparent="trace", scheduler_record=b"r", **EVICT)
    assert (await stream.next("ack")).command_id == "c"
    command = await bench.commands.get()
    assert command.action == messages.Evict()
    assert command.scheduler_record == b"r"
    done = command_done(moved_bytes=7)
    bench.client.on_command_done(done)
    result = await stream.next("result")
    assert (result.command_id, result.moved_bytes, result.status.code) == ("c", 7, 0)
    assert bench.over == [(command, "trace", done)]


async def test_a_repeated_command_is_done_once_and_answered_again(
    bench: Bench, stream: WorkerStream
) -> None:
    stream.command(**EVICT)
    stream.command(**EVICT)
    await stream.next("ack")
    await stream.next("ack")
    bench.client.on_command_done(command_done(moved_bytes=7))
    assert (await stream.next("result")).moved_bytes == 7
    stream.command(**EVICT)
    assert (await stream.next("result")).moved_bytes == 7
    assert bench.commands.qsize() == 1


async def test_bad_commands_fail_by_their_results_and_the_stream_lives(
    bench: Bench, stream: WorkerStream
) -> None:
    stream.command("no-action")
    stream.command("", **EVICT)
    stream.command("bad-session", "a b", **EVICT)
    stream.command("late", timeout=Duration(), **EVICT)
    codes = {}
    for _ in range(4):
        result = await stream.next("result")
        codes[result.command_id] = result.status.code
    assert codes == {"no-action": 3, "": 3, "bad-session": 3, "late": 3}
    stream.command("good", **EVICT)
    assert (await bench.commands.get()).command_id == "good"
    assert bench.commands.empty()


async def test_an_unknown_message_is_ignored(bench: Bench, stream: WorkerStream) -> None:
    stream.outgoing.put_nowait(pb.ConnectResponse())
    stream.command(**EVICT)
    assert (await bench.commands.get()).command_id == "c"


async def test_reports_go_up_at_the_interval(
    bench: Bench, scheduler: tuple[FakeScheduler, int]
) -> None:
    bench.client.on_report(report(sessions=1, step_seconds=[1.0]))
    bench.client.on_report(report(sessions=2, step_seconds=[3.0]))
    stream = await scheduler[0].streams.get()
    stream.welcome(interval_s=0.01)
    first = await stream.next("memory_report")
    assert first.sessions == 2
    assert first.mean_step_duration.ToNanoseconds() == 2 * 10**9
    second = await stream.next("memory_report")
    assert not second.HasField("mean_step_duration")


async def test_a_lost_stream_is_followed_by_one_with_a_new_snapshot(
    bench: Bench, stream: WorkerStream, scheduler: tuple[FakeScheduler, int]
) -> None:
    await stream.next("hello")
    stream.command(**EVICT)
    await bench.commands.get()
    bench.sessions.append(session_state("b"))
    stream.end()
    # Done while there is no stream: told when the scheduler asks again.
    again = await scheduler[0].streams.get()
    hello = await again.next("hello")
    assert [session.session_id for session in hello.snapshot] == ["a", "b"]
    again.welcome("another")
    bench.client.on_command_done(command_done(moved_bytes=7))
    again.command(**EVICT)
    assert (await again.next("result")).moved_bytes == 7
    assert bench.commands.empty()


async def test_each_welcome_tells_the_mode_ahead_of_any_command(
    bench: Bench, scheduler: tuple[FakeScheduler, int]
) -> None:
    stream = await scheduler[0].streams.get()
    stream.welcome(mode=pb.WorkerMode(share_prefixes=True))
    stream.command("c1", **EVICT)
    await bench.commands.get()
    narrow = messages.Mode(write_through=False, offload=False)
    assert bench.modes == [narrow]
    stream.end()
    stream = await scheduler[0].streams.get()
    assert bench.modes == [narrow]  # without a scheduler the last one holds
    stream.welcome()
    stream.command("c2", **EVICT)
    await bench.commands.get()
    assert bench.modes == [narrow, messages.Mode()]


async def test_a_scheduler_that_does_not_welcome_is_left(
    bench: Bench, scheduler: tuple[FakeScheduler, int]
) -> None:
    rude = await scheduler[0].streams.get()
    rude.command(**EVICT)
    silent = await scheduler[0].streams.get()
    silent.end()
    stream = await scheduler[0].streams.get()
    stream.welcome()
    stream.command("served", **EVICT)
    assert (await bench.commands.get()).command_id == "served"


async def test_draining_says_hello_again(
    bench: Bench, stream: WorkerStream, scheduler: tuple[FakeScheduler, int]
) -> None:
    assert not (await stream.next("hello")).draining
    bench.client.drain()
    again = await scheduler[0].streams.get()
    assert (await again.next("hello")).draining


async def test_a_scheduler_that_reads_too_slowly_gets_a_snapshot_instead(
    bench: Bench,
    stream: WorkerStream,
    scheduler: tuple[FakeScheduler, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await stream.next("session_event")
    monkeypatch.setattr(module, "MAX_OUTBOX", 3)
    for _ in range(4):
        bench.client.on_session_event(event_of("a"))
    again = await scheduler[0].streams.get()
    assert (await again.received.get()).WhichOneof("message") == "hello"


async def test_an_unreachable_scheduler_is_named_once_and_tried_until_it_is_there(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    bench = Bench(f"127.0.0.1:{port}")
    attempts = asyncio.Semaphore(0)
    backoff = bench.client._backoff

    class Counting(Backoff):
        def delay_s(self, failures: int) -> float:
            attempts.release()
            return backoff.delay_s(failures)

    bench.client._backoff = Counting()
    caplog.set_level(logging.INFO, logger="services.worker.front.control_client")
    async with running(bench.client):
        for _ in range(3):
            await attempts.acquire()
        fake = FakeScheduler()
        async with fake.serving(port):
            stream = await fake.streams.get()
            stream.welcome("epoch-7")
            stream.command(**EVICT)
            await bench.commands.get()
    lines = [record.getMessage() for record in caplog.records]
    assert len([line for line in lines if "no scheduler at" in line]) == 1
    assert f"127.0.0.1:{port}" in lines[0]
    assert any("epoch-7" in line for line in lines)


@given(st.integers(1, 10_000), st.floats(0.001, 1), st.floats(1, 100))
def test_delays_grow_to_the_longest_and_keep_some_chance(
    failures: int, first_s: float, max_s: float
) -> None:
    backoff = Backoff(first_s, 2.0, max_s)
    assert first_s / 2 <= backoff.delay_s(failures) <= max_s
    assert backoff.delay_s(10_000) >= max_s / 2
