"""The client when workers and schedulers are lost, restarted, moved or wrong."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import sys
from collections.abc import AsyncIterator

import pytest

import djinn_client as djinn
from djinn_client import Phase
from djinn_client.testing import FakeServer

EOS = 256
QUICK = djinn.RetryPolicy(give_up_s=30, initial_s=0.01, max_s=0.05)


@pytest.fixture
async def fake() -> AsyncIterator[FakeServer]:
    async with FakeServer() as server:
        yield server


@pytest.fixture
async def client(fake: FakeServer) -> AsyncIterator[djinn.Client]:
    async with await djinn.connect(fake.endpoint, timeout_s=5, retry=QUICK) as connected:
        yield connected


@pytest.fixture
async def agent(client: djinn.Client) -> AsyncIterator[djinn.Session]:
    async with client.session(name="researcher") as session:
        yield session


async def _texts_with(
    fake: FakeServer, generation: djinn.Generation, after: str, *, port: int | None
) -> str:
    """Reads a generation and replaces the worker once `after` has been read."""
    fake.hold_tokens(len(after))
    text = ""
    async for piece in generation:
        text += piece.text
        if text == after:
            await fake.lose_worker()
            fake.release_tokens()
            await fake.start_worker(port=port)
    return text


# --- workers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("port", [None, 0])
async def test_a_worker_lost_in_the_middle_costs_only_time(
    fake: FakeServer, agent: djinn.Session, port: int | None
) -> None:
    fake.add_reply("spirits of fire")
    generation = agent.generate("What?", max_tokens=15)
    assert await _texts_with(fake, generation, "spirits", port=port) == "spirits of fire"
    result = await generation.result()
    assert result.text == "spirits of fire"
    assert result.token_ids == tuple(b"spirits of fire")
    assert result.usage.completion_tokens == 15
    assert result.resumptions >= 1
    assert agent.context == tuple(b"What?spirits of fire")
    assert fake.worker_context(agent.session_id) == agent.context
    last = fake.requests[-1]
    assert last.full_context == tuple(b"What?spirits")
    assert last.max_tokens == 8
    assert last.append == ()


async def test_half_a_character_is_not_lost_with_its_worker(
    fake: FakeServer, agent: djinn.Session
) -> None:
    fake.add_reply("a😀b")
    fake.hold_tokens(3)
    generation = agent.generate("x")
    text, tokens = "", 0
    async for piece in generation:
        text += piece.text
        tokens += len(piece.token_ids)
        if tokens == 3:
            await fake.lose_worker()
            fake.release_tokens()
            await fake.start_worker()
    assert text == "a😀b"
    assert (await generation.result()).token_ids == (*"a😀b".encode(), EOS)


async def test_a_worker_lost_between_generations_is_sent_the_whole_context(
    fake: FakeServer, agent: djinn.Session
) -> None:
    await agent.generate_text("one", max_tokens=3)
    await fake.lose_worker()
    await fake.start_worker()
    await agent.generate_text("two", max_tokens=1)
    assert fake.requests[-1].full_context == tuple(b"one[3 ")
    assert fake.requests[-1].append == "two"
    assert fake.worker_context(agent.session_id) == agent.context


async def test_a_session_moved_while_a_tool_ran(fake: FakeServer, agent: djinn.Session) -> None:
    await agent.generate_text("one", max_tokens=3)
    async with agent.tool("search"):
        await fake.lose_worker()
        await fake.start_worker(port=0)
        await agent.signal_phase("IO_WAIT")
    assert agent.worker_endpoint == fake.worker_endpoint, "the signal's answer says so"
    requests = len(fake.requests)
    await agent.generate_text("two", max_tokens=1)
    assert len(fake.requests) == requests + 1
    assert fake.requests[-1].full_context == tuple(b"one[3 ")


@pytest.mark.parametrize("reason", ["ENGINE_LOST", "DRAINING", "UNAVAILABLE", "NO_WORKER"])
@pytest.mark.parametrize("after_tokens", [None, 0, 2])
async def test_an_unavailable_worker_is_tried_again(
    fake: FakeServer, agent: djinn.Session, reason: str, after_tokens: int | None
) -> None:
    fake.fail("Generate", reason, times=2, after_tokens=after_tokens)
    assert await agent.generate_text("x", max_tokens=5) == "[1 to"
    assert agent.last_result is not None
    assert agent.last_result.resumptions == (1 if after_tokens is None else 2)
    assert len(fake.requests) == 3
    assert agent.context == tuple(b"x[1 to")
    assert fake.worker_context(agent.session_id) == agent.context


async def test_a_worker_with_another_context_is_sent_the_whole_one(
    fake: FakeServer, agent: djinn.Session
) -> None:
    await agent.generate_text("one", max_tokens=3)
    fake.forget(agent.session_id)
    await agent.generate_text("two", max_tokens=1)
    assert [request.full_context for request in fake.requests] == [None, None, tuple(b"one[3 ")]
    assert fake.worker_context(agent.session_id) == agent.context


@pytest.mark.parametrize("reason", ["CONTEXT_MISMATCH", "SESSION_UNKNOWN"])
async def test_a_whole_context_that_is_refused_is_an_error(
    fake: FakeServer, agent: djinn.Session, reason: str
) -> None:
    fake.fail("Generate", reason, times=2)
    with pytest.raises(djinn.DjinnError) as caught:
        await agent.generate_text("x")
    assert caught.value.reason == reason
    assert len(fake.requests) == 2
    assert await agent.generate_text("x", max_tokens=1) == "["


async def test_the_seed_stays_when_a_generation_is_sent_again(
    fake: FakeServer, agent: djinn.Session
) -> None:
    fake.fail("Generate", "ENGINE_LOST", after_tokens=2)
    await agent.generate_text("x", max_tokens=4, temperature=1.0)
    first, second = fake.requests
    assert first.seed == second.seed
    assert first.seed is not None


async def test_other_tokens_after_a_loss_do_not_change_what_was_yielded(
    fake: FakeServer, agent: djinn.Session, caplog: pytest.LogCaptureFixture
) -> None:
    fake.add_reply("a😀b")
    fake.hold_tokens(2)
    generation = agent.generate("x", max_tokens=6)
    ids: list[int] = []
    async for piece in generation:
        ids.extend(piece.token_ids)
        if len(ids) == 2:
            # The new worker's model says something else after the letter.
            fake.model.forget_given()
            fake.add_reply("zzzz")
            await fake.lose_worker()
            fake.release_tokens()
            await fake.start_worker()
    assert ids[:2] == [ord("a"), 0xF0]
    assert len(ids) == 6
    assert agent.context == (ord("x"), *ids)
    assert "repeats other tokens" in caplog.text


async def test_the_last_word_of_a_lost_worker_is_not_asked_for_again(
    fake: FakeServer, agent: djinn.Session
) -> None:
    fake.add_reply("abc")
    fake.fail("Generate", "ENGINE_LOST", after_tokens=3)
    generation = agent.generate("x", max_tokens=3)
    assert (await generation.result()).finish_reason is djinn.FinishReason.LENGTH
    assert len(fake.requests) == 1
    await agent.generate_text("y", max_tokens=1)
    assert fake.requests[-1].full_context == tuple(b"xabc")


async def test_it_gives_up_in_time(fake: FakeServer) -> None:
    policy = djinn.RetryPolicy(give_up_s=0.05, initial_s=0.01, max_s=0.01)
    async with (
        await djinn.connect(fake.endpoint, retry=policy) as client,
        client.session() as agent,
    ):
        await fake.lose_worker()
        with pytest.raises(djinn.ConnectError, match=agent.worker_endpoint):
            await agent.generate_text("x")
        await fake.start_worker()


async def test_nothing_keeps_a_generation_that_was_left_after_a_loss(
    fake: FakeServer, agent: djinn.Session
) -> None:
    gc.disable()
    try:
        fake.fail("Generate", "ENGINE_LOST", after_tokens=1)
        fake.fail("GetModel", "UNAVAILABLE")
        fake.fail("Generate", "NO_WORKER")
        async for piece in agent.generate("x"):
            if piece.text == "1":
                break
        assert await agent.generate_text("y", max_tokens=1) == "["
    finally:
        gc.enable()


async def test_the_deadline_bounds_the_retries(fake: FakeServer, agent: djinn.Session) -> None:
    await fake.lose_worker()
    with pytest.raises(djinn.DjinnError) as caught:
        await agent.generate_text("x", timeout_s=0.2)
    assert isinstance(caught.value, djinn.DeadlineExceededError | djinn.ConnectError)


async def test_a_task_can_be_cancelled_while_it_waits_for_a_worker(
    fake: FakeServer, agent: djinn.Session
) -> None:
    fake.fail("Generate", "DRAINING", times=1, retry_after_s=20)
    task = asyncio.create_task(agent.generate_text("x"))
    await fake.wait_until(lambda: len(fake.requests) == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await agent.generate_text("x", max_tokens=1) == "["


@pytest.mark.parametrize("how", ["left", "failed", "lost"])
async def test_a_worker_that_has_not_noticed_the_cut_is_waited_for(
    fake: FakeServer, agent: djinn.Session, how: str
) -> None:
    if how == "left":
        async for _ in agent.generate("x"):
            break
    elif how == "failed":
        fake.hold_tokens()
        with pytest.raises(djinn.DeadlineExceededError):
            await agent.generate_text("x", timeout_s=0.05)
        fake.release_tokens()
    else:
        fake.fail("Generate", "UNAVAILABLE")
    fake.fail("Generate", "SESSION_BUSY", times=2)
    assert await agent.generate_text("y", max_tokens=1) == "["
    fake.fail("Generate", "SESSION_BUSY")
    with pytest.raises(djinn.SessionBusyError):
        await agent.generate_text("z")


async def test_a_session_that_the_worker_says_is_closed_is_not_tried_again(
    fake: FakeServer, agent: djinn.Session
) -> None:
    fake.fail("Generate", "SESSION_CLOSED")
    with pytest.raises(djinn.SessionClosedError):
        await agent.generate_text("x")
    assert len(fake.requests) == 1


async def test_a_missed_deadline_names_what_the_last_try_met(
    fake: FakeServer, agent: djinn.Session
) -> None:
    fake.fail("Generate", "ENGINE_LOST", times=1000)
    with pytest.raises(djinn.DeadlineExceededError, match="the last try failed") as caught:
        await agent.generate_text("x", timeout_s=0.3)
    assert isinstance(caught.value.__cause__, djinn.EngineLostError)


async def test_closing_the_session_ends_the_wait_for_its_worker(
    fake: FakeServer, client: djinn.Client, agent: djinn.Session
) -> None:
    fake.fail("Generate", "DRAINING", retry_after_s=0.05)
    task = asyncio.create_task(agent.generate_text("x"))
    await fake.wait_until(lambda: len(fake.requests) == 1)
    await agent.aclose()
    with pytest.raises(djinn.GenerationCancelledError):
        await task
    assert len(fake.requests) == 1
    assert await client.sessions() == [], "asking for its worker must not open it again"


# --- schedulers ----------------------------------------------------------------------------------


async def test_a_new_scheduler_is_told_all_phases(fake: FakeServer, client: djinn.Client) -> None:
    async with contextlib.AsyncExitStack() as stack:
        agents = [await stack.enter_async_context(client.session()) for _ in range(3)]
        await agents[0].signal_phase("IO_WAIT", tool_name="a")
        await agents[1].signal_phase("IO_WAIT", tool_name="b")
        await fake.stop_scheduler()
        said = len(fake.signals)
        await fake.start_scheduler()
        await fake.wait_until(lambda: len(fake.signals) >= said + 2)
        again = {s.session_id: (s.phase, s.sequence, s.tool_name) for s in fake.signals[said:]}
        assert again == {
            agents[0].session_id: (Phase.IO_WAIT, 1, "a"),
            agents[1].session_id: (Phase.IO_WAIT, 1, "b"),
        }
        assert (await client.get_session(agents[1].session_id)).tool_name == "b"


async def test_without_a_stream_a_new_scheduler_is_known_by_its_epoch() -> None:
    async with (
        FakeServer(streams_phases=False) as fake,
        await djinn.connect(fake.endpoint, retry=QUICK) as client,
        client.session() as quiet,
        client.session() as busy,
    ):
        await quiet.signal_phase("IO_WAIT", tool_name="quiet")
        await fake.stop_scheduler()
        await fake.start_scheduler()
        said = len(fake.signals)
        await busy.signal_phase("IO_WAIT", tool_name="busy")
        await fake.wait_until(lambda: len(fake.signals) >= said + 2)
        assert (await client.get_session(quiet.session_id)).tool_name == "quiet"


async def test_a_signal_outlives_a_scheduler_that_is_away(
    fake: FakeServer, agent: djinn.Session
) -> None:
    await agent.signal_phase("IO_WAIT")
    await fake.stop_scheduler()
    agent.signal_phase("COMPUTE")
    agent.signal_phase("IO_WAIT", tool_name="second")
    said = len(fake.signals)
    await fake.start_scheduler()
    await fake.wait_until(lambda: len(fake.signals) > said)
    assert fake.signals[-1].tool_name == "second"
    assert fake.signals[-1].sequence == 3


async def test_a_tool_ends_well_without_a_scheduler(fake: FakeServer, agent: djinn.Session) -> None:
    await agent.generate_text("x", max_tokens=1)
    await fake.stop_scheduler()
    async with agent.tool("search"):
        pass
    assert await agent.generate_text("y", max_tokens=1) == "["
    assert agent.last_wake_latency_s is not None
    await fake.start_scheduler()


async def test_awaiting_a_signal_is_bounded(
    fake: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        await djinn.connect(fake.endpoint, timeout_s=0.2, retry=QUICK) as client,
        client.session() as agent,
    ):
        await fake.stop_scheduler()
        await agent.signal_phase("IO_WAIT")
        assert "has not reached the scheduler yet" in caplog.text
        await fake.start_scheduler()


async def test_a_stream_that_does_not_answer_is_made_anew(fake: FakeServer) -> None:
    async with (
        await djinn.connect(fake.endpoint, timeout_s=0.2, retry=QUICK) as client,
        client.session() as agent,
    ):
        fake.answers_signals = False
        agent.signal_phase("IO_WAIT")
        await fake.wait_until(lambda: len(fake.signals) >= 2)
        assert {signal.sequence for signal in fake.signals} == {1}
        fake.answers_signals = True
        await agent.signal_phase("IO_WAIT")


async def test_worker_and_scheduler_lost_together(fake: FakeServer, agent: djinn.Session) -> None:
    fake.add_reply("spirits of fire")
    fake.hold_tokens(7)
    generation = agent.generate("What?", max_tokens=15)
    text = ""
    async for piece in generation:
        text += piece.text
        if text == "spirits":
            fake.release_tokens()
            await fake.stop_scheduler()
            await fake.lose_worker()
            await fake.start_worker(port=0)
            await fake.start_scheduler()
    assert text == "spirits of fire"
    assert agent.worker_endpoint == fake.worker_endpoint


async def test_closing_without_a_scheduler_is_made_up_for(
    fake: FakeServer, client: djinn.Client
) -> None:
    async with client.session() as agent:
        fake.fail("CloseSession", "UNAVAILABLE", times=2)
    async with await djinn.connect(fake.endpoint) as other:
        await client.aclose()
        assert agent.session_id not in {s.session_id for s in await other.sessions()}


async def test_a_session_that_cannot_be_closed_is_only_logged(
    fake: FakeServer, client: djinn.Client, caplog: pytest.LogCaptureFixture
) -> None:
    async with client.session() as agent:
        fake.fail("CloseSession", "INTERNAL", "a bug")
    assert f"session {agent.session_id} was not closed: a bug" in caplog.text


async def test_a_cancelled_task_closes_its_session(fake: FakeServer, client: djinn.Client) -> None:
    fake.hold_tokens()

    async def live() -> None:
        async with client.session() as agent:
            await agent.generate_text("x")

    task = asyncio.create_task(live())
    await fake.wait_until(lambda: len(fake.requests) == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await client.sessions() == []


# --- processes -----------------------------------------------------------------------------------

_SERVER = """
import asyncio, sys
from djinn_client.testing import FakeServer

async def main():
    fake = FakeServer(["spirits of fire"])
    fake.hold_tokens(int(sys.argv[3]))
    await fake.start_worker(port=int(sys.argv[2]))
    await fake.start_scheduler(port=int(sys.argv[1]))
    print(fake.endpoint, fake.worker_endpoint, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def _serve(*ports: int, hold_after: int) -> tuple[asyncio.subprocess.Process, list[str]]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        _SERVER,
        *map(str, ports),
        str(hold_after),
        stdout=asyncio.subprocess.PIPE,
        env=os.environ | {"GRPC_VERBOSITY": "NONE"},
    )
    assert process.stdout is not None
    return process, (await process.stdout.readline()).decode().split()


async def _kill(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGKILL)
    await process.communicate()


async def test_a_server_killed_and_started_again_is_not_noticed() -> None:
    process, endpoints = await _serve(0, 0, hold_after=7)
    ports = [int(endpoint.rpartition(":")[2]) for endpoint in endpoints]
    try:
        client = await djinn.connect(endpoints[0], retry=QUICK)
        async with client, client.session() as agent:
            await agent.signal_phase("IO_WAIT")
            generation = agent.generate("What?", max_tokens=15)
            text = ""
            async for piece in generation:
                text += piece.text
                if text == "spirits":
                    await _kill(process)
                    process, _ = await _serve(*ports, hold_after=10_000)
            # The new process has its script from the start, and a context that it has not seen.
            assert text == "spirits" + "spirits "
            assert agent.context == tuple(b"What?" + text.encode())
            async with client.session():
                pass  # The new scheduler is there.
            await agent.signal_phase("IO_WAIT", tool_name="again")
            assert (await client.get_session(agent.session_id)).tool_name == "again"
    finally:
        await _kill(process)
