from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import djinn_client
from djinn_client import Phase, _portal
from djinn_client import sync as djinn
from djinn_client.testing import FakeServer, fake_server


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with fake_server() as server:
        yield server


@pytest.fixture
def client(fake: FakeServer) -> Iterator[djinn.Client]:
    with djinn.connect(fake.endpoint, timeout_s=5) as connected:
        yield connected


@pytest.fixture
def agent(client: djinn.Client) -> Iterator[djinn.Session]:
    with client.session(name="researcher") as session:
        yield session


def test_the_same_names_as_the_asynchronous_client() -> None:
    only_async = {"PhaseSignal", "ToolCall"}
    assert set(djinn.__all__) == set(djinn_client.__all__) - only_async


@pytest.mark.parametrize("name", ["Client", "Session", "Generation", "Admin"])
def test_the_same_methods_as_the_asynchronous_classes(name: str) -> None:
    def public(kind: type) -> set[str]:
        return {name for name in dir(kind) if not name.startswith("_")}

    renamed = {"aclose": "close"}
    theirs = {renamed.get(n, n) for n in public(getattr(djinn_client, name))}
    assert theirs - {"active"} <= public(getattr(djinn, name))


def test_an_agent_that_acts(fake: FakeServer, agent: djinn.Session) -> None:
    fake.add_reply("Search: 😀")
    fake.add_reply("They are spirits.")
    generation = agent.generate("Plan.", max_tokens=50)
    text = "".join(piece.text for piece in generation)
    assert text == generation.result().text == "Search: 😀"
    with agent.tool("web_search", expected_s=12):
        inside = agent.phase
    assert (inside, agent.phase) == (Phase.IO_WAIT, Phase.COMPUTE)
    assert agent.generate_text("result") == "They are spirits."
    assert agent.last_wake_latency_s is not None
    assert agent.last_result is not None
    assert agent.last_result.wake_latency_s == agent.last_wake_latency_s
    assert agent.context_length == len(agent.context)
    assert [signal.tool_name for signal in fake.signals] == ["web_search", ""]
    assert agent.chat("hi", max_tokens=1) == "["
    assert fake.requests[-1].append == (("user", "hi"),)


def test_a_failing_tool_wakes_too(agent: djinn.Session) -> None:
    with pytest.raises(ZeroDivisionError), agent.tool():
        raise ZeroDivisionError
    assert agent.phase is Phase.COMPUTE


def test_signals_of_the_current_session(fake: FakeServer, agent: djinn.Session) -> None:
    assert djinn.current_session() is agent
    djinn.signal_phase("IO_WAIT", tool_name="search")
    assert fake.signals[-1].tool_name == "search"
    djinn.signal_phase("COMPUTE")
    with pytest.raises(djinn.InvalidRequestError):
        djinn.signal_phase("SLEEP")
    agent.close()
    with pytest.raises(djinn.SessionClosedError):
        djinn.signal_phase("IO_WAIT")


def test_there_is_no_current_session_outside(client: djinn.Client) -> None:
    with client.session():
        pass
    with pytest.raises(djinn.SessionClosedError, match="no session is current"):
        djinn.current_session()


def test_leaving_the_loop_frees_the_session(fake: FakeServer, agent: djinn.Session) -> None:
    for piece in agent.generate("x"):
        assert piece.text == "["
        break
    assert agent.generate_text("y", max_tokens=1) == "["
    assert fake.requests[-1].full_context is not None


def test_a_generation_can_be_closed(agent: djinn.Session) -> None:
    with agent.generate("x") as generation:
        next(generation)
    assert list(generation) == []
    with pytest.raises(djinn.GenerationCancelledError):
        generation.result()


def test_errors_are_the_same(agent: djinn.Session) -> None:
    with pytest.raises(djinn.InvalidRequestError) as caught:
        agent.generate_text("x", max_tokens=0)
    assert caught.value.field == "max_tokens"
    with pytest.raises(djinn.InvalidRequestError):
        agent.generate("x", temperature="hot")  # type: ignore[arg-type]


def test_two_generations_at_once(fake: FakeServer, agent: djinn.Session) -> None:
    first = agent.generate("one", max_tokens=2)
    next(first)
    with pytest.raises(djinn.SessionBusyError):
        agent.generate_text("two")
    assert first.result().text == "[3"


def test_threads_share_a_client(fake: FakeServer, client: djinn.Client) -> None:
    answers: dict[int, str] = {}

    def live(number: int) -> None:
        with client.session(name=str(number)) as agent:
            agent.generate_text("x" * number, max_tokens=2)
            with djinn.current_session().tool("sleep"):
                pass
            answers[number] = agent.generate_text("y")

    threads = [threading.Thread(target=live, args=(number,)) for number in range(1, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {n: f"[{n + 3} tokens read]" for n in range(1, 6)}


def test_a_fork(client: djinn.Client, agent: djinn.Session) -> None:
    agent.generate_text("one", max_tokens=1)
    with client.session(fork_of=agent) as fork:
        assert fork.context == agent.context


def test_what_the_client_can_be_asked(
    fake: FakeServer, client: djinn.Client, agent: djinn.Session
) -> None:
    assert [session.session_id for session in client.sessions()] == [agent.session_id]
    assert client.get_session(agent.session_id).name == agent.name == "researcher"
    assert client.model().model == "fake"
    assert client.endpoint == fake.endpoint
    assert [worker.endpoint for worker in client.admin.workers()] == [agent.worker_endpoint]
    client.admin.evict(agent.session_id)
    client.admin.restore(agent.session_id)
    client.admin.drop(agent.session_id)
    assert client.admin.drain("fake-worker").draining
    assert client.admin.stats().policy == "fake"
    assert len(fake.commands) == 3


def test_a_closed_client_says_so(fake: FakeServer) -> None:
    client = djinn.connect(fake.endpoint)
    agent = client.session()
    agent.open()
    client.close()
    client.close()
    agent.close()
    assert agent.phase is Phase.CLOSED
    with pytest.raises(RuntimeError, match="the client is closed"):
        client.sessions()


def test_nobody_at_the_address_leaves_no_thread(fake: FakeServer) -> None:
    before = threading.active_count()
    with pytest.raises(djinn.ConnectError, match="no Djinn scheduler at"):
        djinn.connect(fake.worker_endpoint)
    assert threading.active_count() == before


def test_the_callers_span_is_the_parent(fake: FakeServer) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with (
        djinn.connect(fake.endpoint, tracer_provider=provider) as client,
        client.session() as agent,
        provider.get_tracer("test").start_as_current_span("task") as task,
    ):
        agent.generate_text("x", max_tokens=1)
    (generate,) = [span for span in exporter.get_finished_spans() if span.name == "generate"]
    assert generate.parent is not None
    assert generate.parent.span_id == task.get_span_context().span_id


def test_a_portal_ends_what_runs_in_it() -> None:
    portal = _portal.Portal()
    ended = threading.Event()
    started = threading.Event()

    async def wait_forever() -> None:
        import asyncio

        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    def start() -> None:
        import asyncio

        tasks.append(asyncio.create_task(wait_forever()))

    tasks: list[object] = []
    portal.call_sync(start)
    started.wait()
    portal.close()
    assert ended.is_set()
    assert portal.closed
    portal.close()
    portal.post(start)
    assert len(tasks) == 1
