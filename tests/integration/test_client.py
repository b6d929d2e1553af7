"""The client against the fake of `djinn_client.testing`: sessions, generations, phases."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator

import pytest

import djinn_client as djinn
from djinn_client import FinishReason, Phase
from djinn_client.testing import FakeServer

EOS = 256


@pytest.fixture
async def fake() -> AsyncIterator[FakeServer]:
    async with FakeServer() as server:
        yield server


@pytest.fixture
async def client(fake: FakeServer) -> AsyncIterator[djinn.Client]:
    async with await djinn.connect(fake.endpoint, timeout_s=5) as connected:
        yield connected


@pytest.fixture
async def agent(client: djinn.Client) -> AsyncIterator[djinn.Session]:
    async with client.session(name="researcher") as session:
        yield session


# --- generating ----------------------------------------------------------------------------------


async def test_pieces_make_up_the_result(fake: FakeServer, agent: djinn.Session) -> None:
    fake.add_reply("Djinns: 😀")
    generation = agent.generate("Plan.", max_tokens=50)
    pieces = [piece async for piece in generation]
    result = await generation.result()
    assert "".join(piece.text for piece in pieces) == result.text == "Djinns: 😀"
    ids = tuple(token for piece in pieces for token in piece.token_ids)
    assert ids == result.token_ids == (*b"Djinns: \xf0\x9f\x98\x80", EOS)
    assert result.finish_reason is FinishReason.STOP
    assert result.usage == djinn.Usage(5, 0, 5, 13)
    assert result.resumptions == 0
    assert result.wake_latency_s is None
    assert 0 < result.first_token_s <= result.duration_s
    assert agent.last_result is result


async def test_the_context_grows_by_prompt_and_answer(
    fake: FakeServer, agent: djinn.Session
) -> None:
    fake.add_reply("A")
    await agent.generate_text("one")
    fake.add_reply("B")
    await agent.generate_text("two")
    assert agent.context == (*b"one", *b"A", EOS, *b"two", *b"B", EOS)
    assert agent.context_length == len(agent.context)
    assert fake.worker_context(agent.session_id) == agent.context
    assert [request.full_context for request in fake.requests] == [None, None]
    assert [request.expected_context_length for request in fake.requests] == [0, 5]


async def test_every_kind_of_prompt(fake: FakeServer, agent: djinn.Session) -> None:
    await agent.generate_text([104, 105], max_tokens=1)
    await agent.generate_text((1, 2), max_tokens=1)
    await agent.generate_text(djinn.user("hello"), max_tokens=1)
    await agent.generate_text([djinn.system("be brief"), djinn.user("hi")], max_tokens=1)
    await agent.chat("found 3", role="tool", max_tokens=1)
    await agent.generate_text(max_tokens=1)
    assert [request.append for request in fake.requests] == [
        (104, 105),
        (1, 2),
        (("user", "hello"),),
        (("system", "be brief"), ("user", "hi")),
        (("tool", "found 3"),),
        (),
    ]


async def test_a_full_context_replaces_the_log(fake: FakeServer, agent: djinn.Session) -> None:
    fake.add_reply("A")
    await agent.generate_text("one")
    fake.add_reply("B")
    await agent.generate_text("!", full_context=[*b"two"])
    assert agent.context == (*b"two!B", EOS)
    assert fake.worker_context(agent.session_id) == agent.context


async def test_a_fork_starts_with_a_copy(fake: FakeServer, client: djinn.Client) -> None:
    async with client.session() as first:
        await first.generate_text("one")
        before = first.context
        async with client.session(fork_of=first) as second:
            assert second.context == before
            await second.generate_text("two", max_tokens=1)
            assert second.context[: len(before)] == before
            assert fake.worker_context(second.session_id) == second.context
        assert first.context == before
    assert fake.requests[1].full_context == before


async def test_stop_strings_logprobs_and_logits(fake: FakeServer, agent: djinn.Session) -> None:
    fake.add_reply("one STOP two")
    generation = agent.generate("x", stop="STOP", logprobs=1, return_logits=True)
    pieces = [piece async for piece in generation]
    result = await generation.result()
    assert result.text == "one "
    assert (result.finish_reason, result.stop_string) == (FinishReason.STOP, "STOP")
    assert [position.chosen.token_id for position in result.logprobs] == list(result.token_ids)
    assert result.logprobs[0].top == (djinn.TokenLogprob(ord("o"), 0.0),)
    assert all(len(piece.logits) == len(piece.token_ids) for piece in pieces)
    assert result.token_ids == tuple(b"one STOP")
    assert agent.context == (*b"x", *b"one STOP")


async def test_length_and_stop_token_ids(fake: FakeServer, agent: djinn.Session) -> None:
    fake.add_reply("abcdef")
    assert await agent.generate_text("x", max_tokens=2) == "ab"
    assert agent.last_result is not None
    assert agent.last_result.finish_reason is FinishReason.LENGTH
    fake.add_reply("abcdef")
    assert await agent.generate_text("y", stop_token_ids=[ord("c")]) == "abc"


async def test_a_seed_is_drawn_for_sampling_and_only_then(
    fake: FakeServer, agent: djinn.Session
) -> None:
    await agent.generate_text("x", max_tokens=1)
    await agent.generate_text("x", max_tokens=1, temperature=0.5)
    await agent.generate_text("x", max_tokens=1, temperature=0.5)
    await agent.generate_text("x", max_tokens=1, temperature=0.5, seed=7)
    none, first, second, given = (request.seed for request in fake.requests)
    assert none is None
    assert given == 7
    assert first is not None
    assert first != second


async def test_a_result_needs_no_loop_and_can_be_asked_for_twice(agent: djinn.Session) -> None:
    generation = agent.generate("x")
    result = await generation.result()
    assert result.text == "[1 tokens read]"
    assert await generation.result() is result
    assert [piece async for piece in generation] == []


# --- errors of the request -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"temperature": math.nan}, "sampling.temperature"),
        ({"prompt": ""}, "append"),
        ({"prompt": [500]}, "append_token_ids"),
    ],
)
async def test_what_the_worker_refuses_is_typed_and_disturbs_nobody(
    fake: FakeServer, agent: djinn.Session, options: dict[str, object], field: str
) -> None:
    prompt = options.pop("prompt", "x")
    with pytest.raises(djinn.InvalidRequestError) as caught:
        await agent.generate_text(prompt, **options)  # type: ignore[arg-type]
    assert caught.value.field == field
    assert await agent.generate_text("x", max_tokens=1) == "["


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"seed": -1}, "seed"),
        ({"top_k": 1.5}, "top_k"),
        ({"stop": [3]}, "stop_strings"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"timeout_s": math.inf}, "timeout_s"),
        ({"prompt": [2**40]}, "append_token_ids"),
        ({"prompt": ["a"]}, "append_token_ids"),
        ({"prompt": [djinn.user("x"), 3]}, "prompt"),
        ({"prompt": 3}, "prompt"),
    ],
)
async def test_what_cannot_be_sent_is_refused_where_it_is_written(
    fake: FakeServer, agent: djinn.Session, options: dict[str, object], field: str
) -> None:
    prompt = options.pop("prompt", "x")
    with pytest.raises(djinn.InvalidRequestError) as caught:
        agent.generate(prompt, **options)  # type: ignore[arg-type]
    assert caught.value.field == field
    assert fake.requests == []


async def test_a_misspelt_option_is_a_type_error(agent: djinn.Session) -> None:
    with pytest.raises(TypeError, match="max_token"):
        agent.generate("x", max_token=3)  # type: ignore[call-arg]


async def test_a_context_too_long_names_the_limit() -> None:
    async with (
        FakeServer(max_context_length=10) as fake,
        await djinn.connect(fake.endpoint) as client,
        client.session() as agent,
    ):
        with pytest.raises(djinn.ContextTooLongError) as caught:
            await agent.generate_text("123456789", max_tokens=5)
        assert caught.value.limit == 10
        assert await agent.generate_text("123", max_tokens=1) == "["


async def test_two_generations_at_once_are_refused_here_and_the_first_goes_on(
    fake: FakeServer, agent: djinn.Session
) -> None:
    fake.hold_tokens(after_tokens=1)
    first = agent.generate("one", max_tokens=3)
    assert (await anext(first)).text == "["
    with pytest.raises(djinn.SessionBusyError, match=agent.session_id):
        await agent.generate_text("two")
    fake.release_tokens()
    assert (await first.result()).text == "[3 "
    assert len(fake.requests) == 1
    assert await agent.generate_text("two", max_tokens=1) == "["


async def test_a_session_that_another_client_uses_is_busy(fake: FakeServer) -> None:
    async with (
        await djinn.connect(fake.endpoint) as one,
        await djinn.connect(fake.endpoint) as two,
        one.session(session_id="shared") as mine,
        two.session(session_id="shared") as his,
    ):
        fake.hold_tokens(after_tokens=1)
        first = mine.generate("one", max_tokens=2)
        await anext(first)
        with pytest.raises(djinn.SessionBusyError):
            await his.generate_text("two")
        fake.release_tokens()
        assert (await first.result()).text == "[3"


async def test_a_session_not_open_or_closed(client: djinn.Client) -> None:
    session = client.session()
    with pytest.raises(djinn.SessionClosedError, match="not been opened"):
        await session.generate_text("x")
    async with session:
        pass
    assert session.phase is Phase.CLOSED
    with pytest.raises(djinn.SessionClosedError, match="is closed"):
        await session.generate_text("x")
    with pytest.raises(djinn.SessionClosedError):
        session.signal_phase("IO_WAIT")
    with pytest.raises(djinn.SessionClosedError):
        await session.open()
    await session.aclose()


async def test_what_opening_may_answer(fake: FakeServer, client: djinn.Client) -> None:
    fake.fail("OpenSession", "EXHAUSTED", "pool full", retry_after_s=2.5)
    with pytest.raises(djinn.ExhaustedError, match="pool full") as caught:
        await client.session().open()
    assert caught.value.retry_after_s == 2.5
    async with (
        await djinn.connect(fake.endpoint, tenant="other") as other,
        other.session(session_id="taken"),
    ):
        with pytest.raises(djinn.SessionExistsError):
            await client.session(session_id="taken").open()
    with pytest.raises(djinn.InvalidRequestError):
        await client.session(priority=2**40).open()


async def test_opening_waits_for_a_worker(fake: FakeServer, client: djinn.Client) -> None:
    fake.fail("OpenSession", "NO_WORKER", times=3)
    async with client.session() as agent:
        assert await agent.generate_text("x", max_tokens=1) == "["


async def test_a_generation_that_takes_too_long(fake: FakeServer, agent: djinn.Session) -> None:
    fake.hold_tokens()
    with pytest.raises(djinn.DeadlineExceededError, match=r"not done within 0\.05 s"):
        await agent.generate_text("x", timeout_s=0.05)
    fake.release_tokens()
    assert await agent.generate_text("y", max_tokens=1) == "["
    assert agent.context == tuple(b"xy[")
    assert fake.worker_context(agent.session_id) == agent.context


# --- leaving early -------------------------------------------------------------------------------


async def test_leaving_the_loop_cancels_the_call(fake: FakeServer, agent: djinn.Session) -> None:
    fake.hold_tokens(after_tokens=2)
    async for piece in agent.generate("x"):
        if piece.text == "1":
            break
    await fake.wait_until(lambda: not fake.is_generating(agent.session_id))
    fake.release_tokens()
    assert agent.context == tuple(b"x[1")
    await agent.generate_text("y", max_tokens=1)
    assert fake.requests[1].full_context == tuple(b"x[1")
    assert fake.worker_context(agent.session_id) == agent.context


async def test_the_next_generation_may_follow_at_once(
    fake: FakeServer, agent: djinn.Session
) -> None:
    # The worker may still run the first when the second comes.
    fake.hold_tokens(after_tokens=1)
    for _ in range(5):
        async for _ in agent.generate("x", max_tokens=2):
            break
    fake.release_tokens()
    await agent.generate_text("y", max_tokens=1)
    assert fake.worker_context(agent.session_id) == agent.context


async def test_a_cancelled_task_cancels_the_call(fake: FakeServer, agent: djinn.Session) -> None:
    fake.hold_tokens(after_tokens=1)
    task = asyncio.create_task(agent.generate_text("x"))
    await fake.wait_until(lambda: fake.is_generating(agent.session_id))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await fake.wait_until(lambda: not fake.is_generating(agent.session_id))
    fake.release_tokens()
    await agent.generate_text("y", max_tokens=1)
    assert fake.requests[-1].full_context is not None
    assert fake.worker_context(agent.session_id) == agent.context


async def test_closing_from_another_task_ends_the_loop(
    fake: FakeServer, agent: djinn.Session
) -> None:
    fake.hold_tokens(after_tokens=1)
    generation = agent.generate("x")
    texts: list[str] = []
    second_asked_for = asyncio.Event()

    async def read() -> None:
        async for piece in generation:
            texts.append(piece.text)
            second_asked_for.set()

    reader = asyncio.create_task(read())
    await second_asked_for.wait()
    await generation.aclose()
    await reader
    assert texts == ["["]
    with pytest.raises(djinn.GenerationCancelledError):
        await generation.result()


async def test_a_generation_is_a_block_too(fake: FakeServer, agent: djinn.Session) -> None:
    fake.hold_tokens(after_tokens=1)
    async with agent.generate("x") as generation:
        assert (await anext(generation)).text == "["
    assert not generation.active
    await fake.wait_until(lambda: not fake.is_generating(agent.session_id))


async def test_closing_the_session_ends_its_generation(
    fake: FakeServer, client: djinn.Client
) -> None:
    fake.hold_tokens(after_tokens=1)
    async with client.session() as agent:
        generation = agent.generate("x")
        await anext(generation)
    assert [piece async for piece in generation] == []


# --- phases --------------------------------------------------------------------------------------


def _phases(fake: FakeServer) -> list[tuple[Phase, int]]:
    return [(signal.phase, signal.sequence) for signal in fake.signals]


async def test_a_tool_waits_and_wakes(fake: FakeServer, agent: djinn.Session) -> None:
    await agent.generate_text("x", max_tokens=1)
    async with agent.tool("web_search", expected_s=12.5):
        inside, before = agent.phase, agent.last_wake_latency_s
    assert (inside, agent.phase) == (Phase.IO_WAIT, Phase.COMPUTE)
    assert before is None
    await agent.generate_text("y", max_tokens=1)
    await fake.wait_until(lambda: len(fake.signals) == 2)
    assert _phases(fake) == [(Phase.IO_WAIT, 1), (Phase.COMPUTE, 2)]
    first, second = fake.signals
    assert (first.tool_name, first.expected_s, first.streamed) == ("web_search", 12.5, True)
    assert (second.tool_name, second.expected_s) == ("", None)
    assert agent.last_wake_latency_s is not None
    assert agent.last_result is not None
    assert agent.last_result.wake_latency_s == agent.last_wake_latency_s
    await agent.generate_text("z", max_tokens=1)
    assert agent.last_result.wake_latency_s is None


async def test_a_failing_tool_wakes_too(fake: FakeServer, agent: djinn.Session) -> None:
    def break_down() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        async with agent.tool():
            break_down()
    await fake.wait_until(lambda: len(fake.signals) == 2)
    assert agent.phase is Phase.COMPUTE


async def test_tools_at_the_same_time_wake_when_the_last_is_done(
    fake: FakeServer, agent: djinn.Session
) -> None:
    async with agent.tool("a"):
        async with agent.tool("b"):
            pass
        assert agent.phase is Phase.IO_WAIT
    await fake.wait_until(lambda: len(fake.signals) == 3)
    assert [phase for phase, _ in _phases(fake)] == [Phase.IO_WAIT, Phase.IO_WAIT, Phase.COMPUTE]


async def test_signals_of_the_current_session(fake: FakeServer, client: djinn.Client) -> None:
    async with client.session() as outer, client.session() as inner:
        assert djinn.current_session() is inner
        await djinn.signal_phase("IO_WAIT", tool_name="search")
        assert _phases(fake) == [(Phase.IO_WAIT, 1)], "awaiting waits for the answer"
        djinn.signal_phase("COMPUTE")
        await fake.wait_until(lambda: len(fake.signals) == 2)
        seen = await asyncio.create_task(_current_id())
        assert seen == inner.session_id
        await inner.aclose()
        with pytest.raises(djinn.SessionClosedError, match="is closed"):
            djinn.signal_phase("IO_WAIT")
    assert outer.phase is Phase.CLOSED
    with pytest.raises(djinn.SessionClosedError, match="no session is current"):
        djinn.signal_phase("IO_WAIT")


async def _current_id() -> str:
    return djinn.current_session().session_id


@pytest.mark.parametrize("phase", ["OPEN", "CLOSED", "SLEEP", "io_wait", ""])
async def test_an_unknown_phase_is_named(agent: djinn.Session, phase: str) -> None:
    with pytest.raises(djinn.InvalidRequestError, match="phase") as caught:
        agent.signal_phase(phase)
    assert caught.value.field == "phase"
    assert agent.phase is Phase.OPEN


@pytest.mark.parametrize("seconds", [0, -1.0, math.nan, math.inf])
async def test_an_impossible_expectation_is_named(agent: djinn.Session, seconds: float) -> None:
    with pytest.raises(djinn.InvalidRequestError) as caught:
        async with agent.tool(expected_s=seconds):
            raise AssertionError("not reached")
    assert caught.value.field == "expected_s"
    assert agent.phase is Phase.OPEN


async def test_generating_while_waiting_says_compute(
    fake: FakeServer, agent: djinn.Session
) -> None:
    await agent.signal_phase("IO_WAIT")
    await agent.generate_text("x", max_tokens=1)
    await fake.wait_until(lambda: len(fake.signals) == 2)
    assert _phases(fake)[1] == (Phase.COMPUTE, 2)
    assert agent.last_wake_latency_s is not None


async def test_the_wake_does_not_wait_for_the_scheduler(
    fake: FakeServer, agent: djinn.Session
) -> None:
    await agent.signal_phase("IO_WAIT")
    await fake.stop_scheduler()
    await agent.signal_phase("COMPUTE")
    assert await agent.generate_text("x", max_tokens=1) == "["
    assert agent.last_wake_latency_s is not None


async def test_a_refused_signal_is_an_error_of_the_one_who_waits(
    fake: FakeServer, agent: djinn.Session, caplog: pytest.LogCaptureFixture
) -> None:
    fake.fail("SignalPhase", "SESSION_CLOSED", "closed by the operator")
    with pytest.raises(djinn.SessionClosedError, match="by the operator"):
        await agent.signal_phase("IO_WAIT")
    assert "by the operator" in caplog.text
    await agent.signal_phase("IO_WAIT")
    assert _phases(fake) == [(Phase.IO_WAIT, 1), (Phase.IO_WAIT, 2)]


async def test_a_session_that_ends_is_not_signalled_any_more(
    fake: FakeServer, client: djinn.Client
) -> None:
    for _ in range(10):
        async with client.session() as agent:
            async with agent.tool("search"):
                pass
            agent.signal_phase("IO_WAIT")
    # A signal that came late would have opened its session again.
    assert await client.sessions() == []


async def test_an_unavailable_scheduler_is_told_again(
    fake: FakeServer, client: djinn.Client
) -> None:
    fake.fail("SignalPhase", "UNAVAILABLE", times=2, retry_after_s=0.01)
    async with client.session() as agent:
        await agent.signal_phase("IO_WAIT")
    assert _phases(fake) == [(Phase.IO_WAIT, 1)] * 3


async def test_without_a_stream_each_signal_is_a_call() -> None:
    async with FakeServer(streams_phases=False) as fake:
        async with await djinn.connect(fake.endpoint) as client, client.session() as agent:
            await agent.signal_phase("IO_WAIT")
            agent.signal_phase("COMPUTE")
            await fake.wait_until(lambda: len(fake.signals) == 2)
            fake.fail("SignalPhase", "SESSION_CLOSED")
            with pytest.raises(djinn.SessionClosedError):
                await agent.signal_phase("IO_WAIT")
            fake.fail("SignalPhase", "UNAVAILABLE")
            await agent.signal_phase("IO_WAIT")
        assert all(not signal.streamed for signal in fake.signals)
        assert [phase for phase, _ in _phases(fake)] == [
            Phase.IO_WAIT,
            Phase.COMPUTE,
            Phase.IO_WAIT,
            Phase.IO_WAIT,
            Phase.IO_WAIT,
        ]


async def test_an_id_in_use_goes_on_counting_its_signals(
    fake: FakeServer, client: djinn.Client
) -> None:
    async with client.session(session_id="s") as first:
        await first.signal_phase("IO_WAIT")
        async with await djinn.connect(fake.endpoint) as other:
            again = other.session(session_id="s")
            await again.open()
            await again.signal_phase("IO_WAIT", tool_name="other")
            assert _phases(fake)[-1] == (Phase.IO_WAIT, 2)
            assert (await other.get_session("s")).tool_name == "other"


# --- the client ----------------------------------------------------------------------------------


async def test_many_agents_at_once(fake: FakeServer, client: djinn.Client) -> None:
    async def live(number: int) -> str:
        async with client.session(name=f"agent-{number}") as agent:
            await agent.generate_text("x" * (number + 1))
            async with agent.tool("sleep"):
                await asyncio.sleep(0)
            return await agent.generate_text("y")

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(live(number)) for number in range(20)]
    # Prompt, the answer with its end, and one more.
    expected = [n + 1 + len(f"[{n + 1} tokens read]") + 1 + 1 for n in range(20)]
    assert [task.result() for task in tasks] == [f"[{n} tokens read]" for n in expected]
    assert await client.sessions() == []


async def test_sessions_are_listed_page_by_page() -> None:
    async with (
        FakeServer(page_size=2) as fake,
        await djinn.connect(fake.endpoint) as client,
        await djinn.connect(fake.endpoint, tenant="other") as other,
    ):
        for number in range(5):
            await client.session(f"agent {number}", session_id=f"s{number}").open()
        await other.session(session_id="t").open()
        listed = await client.sessions()
        assert [session.session_id for session in listed] == [f"s{n}" for n in range(5)]
        assert listed[3].name == "agent 3"
        assert len(await client.sessions(all_tenants=True)) == 6
        with pytest.raises(djinn.SessionNotFoundError):
            await client.get_session("none")


async def test_the_model_and_the_admin(
    fake: FakeServer, client: djinn.Client, agent: djinn.Session
) -> None:
    model = await client.model()
    assert (model.model, model.vocab_size, model.eos_token_ids) == ("fake", 257, (EOS,))
    assert await client.model(agent.worker_endpoint) == model
    workers = await client.admin.workers()
    assert [worker.endpoint for worker in workers] == [fake.worker_endpoint]
    await client.admin.evict(agent.session_id, "scrub")
    await client.admin.restore(agent.session_id)
    await client.admin.drop(agent.session_id)
    assert fake.commands == [
        (name, agent.session_id) for name in ("EvictSession", "RestoreSession", "DropSession")
    ]
    assert (await client.admin.drain("fake-worker")).draining
    assert not (await client.admin.drain("fake-worker", resume=True)).draining
    assert (await client.admin.stats()).phases == {Phase.OPEN: 1}


async def test_admin_errors(fake: FakeServer, client: djinn.Client, agent: djinn.Session) -> None:
    with pytest.raises(djinn.InvalidRequestError, match="lazy, release, scrub"):
        await client.admin.evict(agent.session_id, "gently")
    with pytest.raises(djinn.SessionNotFoundError):
        await client.admin.evict("none")
    with pytest.raises(djinn.WorkerNotFoundError):
        await client.admin.drain("none")
    fake.fail("EvictSession", "SESSION_BUSY", "is generating")
    with pytest.raises(djinn.SessionBusyError, match="is generating"):
        await client.admin.evict(agent.session_id)


async def test_nobody_at_the_address() -> None:
    async with FakeServer() as fake:
        free = fake.worker_endpoint
        with pytest.raises(djinn.ConnectError, match=f"no Djinn scheduler at {free}"):
            await djinn.connect(free)
    with pytest.raises(djinn.ConnectError, match=f"no Djinn scheduler at {free}"):
        await djinn.connect(free, timeout_s=2)


@pytest.mark.parametrize("name", ["timeout_s", "generate_timeout_s"])
async def test_an_impossible_timeout(name: str) -> None:
    with pytest.raises(djinn.InvalidRequestError, match=name):
        await djinn.connect("localhost:1", **{name: 0})  # type: ignore[arg-type]


async def test_a_closed_client_closes_its_sessions_and_says_so(fake: FakeServer) -> None:
    client = await djinn.connect(fake.endpoint)
    agent = client.session()
    await agent.open()
    await client.aclose()
    await client.aclose()
    assert agent.phase is Phase.CLOSED
    with pytest.raises(RuntimeError, match="the client is closed"):
        await client.sessions()
    async with await djinn.connect(fake.endpoint) as other:
        assert await other.sessions() == []
