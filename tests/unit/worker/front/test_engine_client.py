"""With a fake engine in a process of its own."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.common.errors import DrainingError, EngineLostError, InternalError
from services.worker import messages
from services.worker.config import EngineConfig
from services.worker.front.engine_client import EngineClient
from services.worker.front.generation import Begun, Delta, End, Generation
from services.worker.front.session_log import SessionLog
from services.worker.front.text_stream import TextStream
from tests.support import fake_engine
from tests.support.stand_ins import submit

CONFIG = EngineConfig(model="dummy:fake", report_interval_s=0.01)


class Listener:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: asyncio.Queue[object] = asyncio.Queue()
        self.on_command_done = self.told.put_nowait
        self.on_session_event = self.told.put_nowait
        self.on_snapshot = self.told.put_nowait
        self.on_report = self.told.put_nowait
        self.on_generation_over = self.told.put_nowait

    async def next(self, kind: type) -> object:
        while not isinstance(message := await self.told.get(), kind):
            pass
        return message


@pytest.fixture
async def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[EngineClient]:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    client = EngineClient(CONFIG, fake_engine.run)
    await client.start()
    await client.wait_ready()
    yield client
    await client.stop()


@pytest.fixture
def listener(engine: EngineClient) -> Listener:
    listener = Listener()
    engine.add_listener(listener)
    return listener


def generation(engine: EngineClient, request_id: str, append: list[int], count: int) -> Generation:
    request = submit(request_id=request_id, session_id=request_id, append=append, max_tokens=count)
    made = Generation(request, SessionLog(), TextStream(None), engine.send)
    engine.submit(made)
    return made


async def tokens_of(generation: Generation) -> list[int]:
    found: list[int] = []
    while (event := await generation.next()) is not None:
        if isinstance(event, Delta):
            found += event.token_ids
    return found


async def test_each_request_gets_its_own_tokens(engine: EngineClient, listener: Listener) -> None:
    running = [generation(engine, f"r{i}", [i], 20) for i in range(10)]
    assert engine.running == 10
    for i, made in enumerate(running):
        assert await tokens_of(made) == [i] * 20
    assert engine.running == 0
    over = [await listener.next(Generation) for _ in range(10)]
    assert set(over) == set(running)


async def test_the_engine_tells_listeners_what_it_does(
    engine: EngineClient, listener: Listener
) -> None:
    made = generation(engine, "r", [1], 1)
    assert isinstance(await made.next(), Begun)
    event = await listener.next(messages.SessionEvent)
    assert isinstance(event, messages.SessionEvent)
    assert event.session.session_id == "r"
    engine.send(messages.GetSnapshot(7))
    engine.send(messages.Command("c", "r", messages.Evict()))
    snapshot = await listener.next(messages.Snapshot)
    assert isinstance(snapshot, messages.Snapshot)
    assert snapshot.snapshot_id == 7
    done = await listener.next(messages.CommandDone)
    assert isinstance(done, messages.CommandDone)
    assert done.command_id == "c"
    assert isinstance(await listener.next(messages.Report), messages.Report)


async def test_nothing_is_left_in_the_file_system_once_it_is_ready(
    engine: EngineClient, tmp_path: Path
) -> None:
    assert engine.alive
    assert not list(tmp_path.iterdir())  # noqa: ASYNC240 - a folder of this test


async def test_a_killed_engine_fails_what_runs_and_says_how(
    engine: EngineClient, listener: Listener
) -> None:
    made = generation(engine, "r", [fake_engine.HANG], 1)
    assert isinstance(await made.next(), Begun)
    assert engine._process is not None
    assert engine._process.pid is not None
    os.kill(engine._process.pid, signal.SIGKILL)
    with pytest.raises(EngineLostError, match="signal 9"):
        await made.next()
    assert "signal 9" in (await engine.wait_lost()).message
    assert not engine.alive
    assert await listener.next(Generation) is made
    with pytest.raises(EngineLostError):
        await engine.wait_idle()


async def test_stopping_fails_what_runs(engine: EngineClient) -> None:
    made = generation(engine, "r", [fake_engine.HANG], 1)
    await made.next()
    await engine.stop()
    with pytest.raises(DrainingError):
        await made.next()


async def test_an_engine_that_does_not_stop_is_killed(engine: EngineClient) -> None:
    assert engine._process is not None
    assert engine._process.pid is not None
    os.kill(engine._process.pid, signal.SIGSTOP)
    await engine.stop(timeout_s=0.05)
    assert engine._process.exitcode == -signal.SIGKILL


async def test_a_frame_that_is_no_batch_is_dropped(
    engine: EngineClient, caplog: pytest.LogCaptureFixture
) -> None:
    engine._deal_frame(b"\xc1junk")
    assert "not a batch" in caplog.text
    made = generation(engine, "r", [1], 2)
    assert await tokens_of(made) == [1, 1]
    assert isinstance(made.end, End)


class FaultyText(TextStream):
    """Meets a bug with the first token."""

    def push(self, token_ids: list[int]) -> tuple[int, str, str | None]:
        raise ValueError("a bug")


async def test_a_bug_with_one_request_fails_that_request_alone(
    engine: EngineClient, listener: Listener, caplog: pytest.LogCaptureFixture
) -> None:
    request = submit(request_id="bad", session_id="bad", append=[1], max_tokens=900)
    sent: list[messages.ToEngine] = []
    bad = Generation(request, SessionLog(), FaultyText(None), sent.append)
    engine.submit(bad)
    good = generation(engine, "good", [2], 20)

    assert isinstance(await bad.next(), Begun)
    with pytest.raises(InternalError, match="front"):
        await bad.next()
    assert await tokens_of(good) == [2] * 20
    assert {await listener.next(Generation), await listener.next(Generation)} == {bad, good}
    assert sent == [messages.Abort("bad")]
    assert "a bug in dealing with Tokens" in caplog.text
    assert "ValueError" in caplog.text


async def test_a_listeners_bug_keeps_nothing_from_the_others(
    engine: EngineClient, listener: Listener, caplog: pytest.LogCaptureFixture
) -> None:
    def bug(message: object) -> None:
        raise ValueError("a bug")

    faulty, last = Listener(), Listener()
    faulty.on_report = faulty.on_generation_over = bug  # type: ignore[assignment]
    engine.add_listener(faulty)
    engine.add_listener(last)

    made = generation(engine, "r", [1], 2)

    assert await tokens_of(made) == [1, 1]
    assert await last.next(Generation) is made
    assert isinstance(await last.next(messages.Report), messages.Report)
    assert "a bug in dealing with Generation" in caplog.text


async def test_a_reader_that_ends_is_the_end_of_the_engine(
    engine: EngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = generation(engine, "r", [fake_engine.HANG], 1)
    assert isinstance(await made.next(), Begun)

    def bug(frame: bytes) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(engine, "_deal_frame", bug)

    with pytest.raises(EngineLostError):
        await made.next()
    assert "signal 9" in (await engine.wait_lost()).message
    assert not engine.alive
