"""The load generator against an OpenAI-compatible server that streams as vLLM does."""

import itertools
from pathlib import Path

import pytest

from loadgen import config, launch, report, runner, systems
from loadgen.errors import LoadgenError, ServerError
from loadgen.progress import NoProgress
from loadgen.record import RequestRecord, read_requests, read_run
from loadgen.runner import RunOptions
from loadgen.stories import Turn
from loadgen.targets.base import TargetError
from loadgen.targets.openai import OpenAITarget
from loadgen.targets.options import OpenAIOptions
from loadgen.workload import ChatPrompt, TokenPrompt
from tests.support.openai_server import FIRST_ID, FakeOpenAI

CONFIGS = Path(config.__file__).parent / "configs"
QUICK = {
    "workload.arrival_rate": "50",
    "workload.think_time_min": "0.01",
    "workload.think_time_max": "0.05",
    "workload.context_length": "40",
    "workload.new_tokens": "5",
}


@pytest.fixture
async def server():
    async with FakeOpenAI() as fake:
        yield fake


async def connect(server, tenant="", **options):
    return await OpenAITarget.connect(server.url, OpenAIOptions(**options), tenant=tenant)


async def generate(session, ids, max_tokens=3):
    generation = session.generate(TokenPrompt(ids), max_tokens, 10.0)
    deltas = [delta async for delta in generation]
    return deltas, await generation.outcome()


async def run(server, out, *, text=False, **changes):
    overrides = QUICK | {f"workload.{key}": str(value) for key, value in changes.items()}
    loaded = config.load(CONFIGS / "poisson_smoke_test.yaml", overrides)
    options = RunOptions(
        server=server.url, target="openai", openai=OpenAIOptions(text=text), out=out
    )
    return await runner.run(loaded, options, NoProgress())


async def test_each_request_carries_the_whole_history(server):
    target = await connect(server)
    session = target.session("a", "", 3)
    first, _ = await generate(session, [1, 2, 3])
    await generate(session, [4, 5])
    await target.aclose()
    generated = [FIRST_ID, FIRST_ID + 1, FIRST_ID + 2]
    assert list(itertools.chain(*(delta.token_ids for delta in first))) == generated
    assert [request["prompt"] for request in server.requests] == [
        [1, 2, 3],
        [1, 2, 3, *generated, 4, 5],
    ]
    assert all(request["ignore_eos"] and request["stream"] for request in server.requests)


async def test_text_has_the_lengths_of_the_workload_and_counts_its_tokens(server):
    server.tokens_per_chunk = 2
    target = await connect(server, text=True)
    session = target.session("a", "", 3)
    deltas, outcome = await generate(session, [1, 2, 3], max_tokens=5)
    await generate(session, [4, 5])
    await target.aclose()
    assert [delta.token_count for delta in deltas] == [2, 2, 1]
    assert outcome.prompt_tokens == 3
    first, second = (request["prompt"] for request in server.requests)
    assert len(first.split()) == 3
    assert second.startswith(f"{first} w1000 w1001")
    assert len(second.split()) == 3 + 5 + 2


async def test_without_running_counts_the_last_one_makes_the_sum_right(server):
    server.tokens_per_chunk, server.continuous_usage = 2, False
    target = await connect(server, text=True)
    deltas, _ = await generate(target.session("a", "", 3), [1, 2, 3], max_tokens=5)
    await target.aclose()
    assert [delta.token_count for delta in deltas] == [1, 1, 1, 2]


async def test_what_was_cached_is_told_where_the_server_does(server):
    server.cached_tokens = 2
    target = await connect(server)
    _, outcome = await generate(target.session("a", "", 3), [1, 2, 3])
    server.cached_tokens = None
    _, silent = await generate(target.session("b", "", 3), [1, 2, 3])
    await target.aclose()
    assert (outcome.prompt_tokens, outcome.cached_tokens, outcome.prefilled_tokens) == (3, 2, 1)
    assert outcome.finish_reason == "length"
    assert outcome.kv is None
    assert (silent.prompt_tokens, silent.cached_tokens, silent.prefilled_tokens) == (3, 0, 0)


async def test_a_run_finds_no_prefix_of_another(server):
    target = await connect(server, tenant="run-7")
    await generate(target.session("a", "", 1), [1])
    await generate(target.session("b", "red", 1), [1])
    await target.aclose()
    assert [request["cache_salt"] for request in server.requests] == ["run-7", "red"]


async def test_a_key_is_sent_as_openais_client_does(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "abc")
    target = await connect(server)
    await generate(target.session("a", "", 1), [1])
    await target.aclose()
    assert server.headers[0]["Authorization"] == "Bearer abc"


REFUSALS = [
    ((404, '{"error": {"message": "no such model", "code": 404}}', {}), "NOT_FOUND", None),
    ((429, '{"error": {"message": "slow down"}}', {"Retry-After": "3"}), "TOO_MANY_REQUESTS", 3.0),
    ((503, "overloaded\nvery", {}), "SERVICE_UNAVAILABLE", None),
    ((599, "", {}), "HTTP_599", None),
]


@pytest.mark.parametrize(("refusal", "reason", "retry_after_s"), REFUSALS)
async def test_refusals_have_a_reason(server, refusal, reason, retry_after_s):
    server.refuse.append(refusal)
    target = await connect(server)
    with pytest.raises(TargetError) as caught:
        await generate(target.session("a", "", 1), [1])
    await target.aclose()
    assert (caught.value.reason, caught.value.retry_after_s) == (reason, retry_after_s)
    assert caught.value.message
    assert "\n" not in str(caught.value)


async def test_an_error_within_a_stream_is_an_error(server):
    target = await connect(server)
    with pytest.raises(TargetError, match="BAD_REQUEST: Token id 99999 is out of vocabulary"):
        await generate(target.session("a", "", 1), [99_999])
    await target.aclose()


async def test_a_stream_that_is_cut_off_is_an_error(server):
    server.cut_after = 1
    target = await connect(server)
    with pytest.raises(TargetError, match=r"UNAVAILABLE|STREAM_CUT"):
        await generate(target.session("a", "", 1), [1])
    await target.aclose()


async def test_a_stream_of_something_else_is_an_error(server):
    server.refuse += [(200, "data: nonsense\n\n", {}), (200, "<html></html>", {})]
    target = await connect(server)
    with pytest.raises(TargetError, match="BAD_ANSWER"):
        await generate(target.session("a", "", 1), [1])
    with pytest.raises(TargetError, match="STREAM_CUT"):
        await generate(target.session("a", "", 1), [1])
    await target.aclose()


async def test_conversations_are_refused(server):
    target = await connect(server)
    with pytest.raises(TargetError, match="NO_CHAT"):
        target.session("a", "", 0).generate(ChatPrompt((Turn("user", "hello"),)), 1, 1.0)
    await target.aclose()


async def test_what_the_server_cannot_do_is_found_before_the_run(server):
    server.token_ids = False
    for options, message in (
        (OpenAIOptions(), "does not return the ids of its tokens; --openai-text"),
        (OpenAIOptions(vocab_size=60_000), "token id 59999 fails: Token id 59999 is out of"),
    ):
        target = await OpenAITarget.connect(server.url, options)
        with pytest.raises(LoadgenError, match=message):
            await target.info()
        await target.aclose()
    with pytest.raises(LoadgenError, match=r"--model other: .* has fake"):
        await connect(server, model="other")


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://x"])
async def test_a_url_that_is_none_is_refused(url):
    with pytest.raises(LoadgenError, match="expected a URL such as"):
        await OpenAITarget.connect(url, OpenAIOptions())


async def test_nobody_there_is_a_clear_error():
    with pytest.raises(ServerError, match=r"http://127\.0\.0\.1:1: ") as caught:
        await OpenAITarget.connect("http://127.0.0.1:1", OpenAIOptions())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
async def test_a_url_may_end_as_other_clients_want_it(server, suffix):
    target = await OpenAITarget.connect(server.url + suffix, OpenAIOptions())
    info = await target.info()
    await target.aclose()
    assert (info.model["model"], info.max_context_length) == ("fake", 4096)
    assert server.requests[0]["prompt"] == [31_999]


async def test_a_run_leaves_the_same_records_as_one_on_djinn(server, tmp_path):
    server.cached_tokens = 16
    folder = await run(server, tmp_path, total_agents=4, iterations=2, mode="live")
    result = report.load(folder)
    assert result.passed
    values = result.aggregates
    assert (values["success_count"], values["requests_ok"], values["wakes"]) == (4, 12, 8)
    assert values["p50_wake_latency_ms"] is not None
    assert values["swap_events"] is None
    assert values["output_tokens"] == 60
    info = read_run(folder)
    assert (info.stats_before, info.stats_after, info.stats_settled) == ({}, {}, True)
    assert (info.target, info.model["model"]) == ("openai", "fake")
    assert len({request["cache_salt"] for request in server.requests[1:]}) == 1
    requests = [r for r in read_requests(folder) if isinstance(r, RequestRecord)]
    for request in requests:
        assert request.prefilled_tokens == request.prompt_tokens - 16
        assert request.prompt_tokens == 40 + request.step * (5 + 32)
        assert request.first_token_s is not None
        assert request.scheduled_s <= request.sent_s <= request.first_token_s <= request.end_s


async def test_a_run_with_text_needs_no_token_ids(server, tmp_path):
    server.token_ids = False
    folder = await run(server, tmp_path, text=True, total_agents=2)
    assert report.load(folder).passed


async def test_a_workload_beyond_the_servers_limit_is_refused(server, tmp_path):
    with pytest.raises(LoadgenError, match="the limit of fake is 4096"):
        await run(server, tmp_path, context_length=5000)


@pytest.mark.peer
@pytest.mark.timeout(600)
async def test_vllm_itself_answers_as_the_fake_does(tmp_path):
    """Needs VLLM_PYTHON and MODEL in the environment, as the shipped systems do."""
    vllm = systems.load(CONFIGS / "systems" / "compare_cpu.yaml")["vllm"]
    async with launch.running("vllm", vllm, tmp_path / "log", print) as url:
        target = await OpenAITarget.connect(url, vllm.openai, tenant="test")
        session = target.session("a", "", 300)
        deltas, first = await generate(session, list(range(300)), max_tokens=4)
        _, second = await generate(session, [5, 6, 7])
        with pytest.raises(TargetError, match="BAD_REQUEST: Token id 99999 is out of vocabulary"):
            await generate(target.session("b", "", 1), [99_999])
        await target.aclose()
        words = await OpenAITarget.connect(url, OpenAIOptions(text=True))
        spoken, told = await generate(words.session("c", "", 20), list(range(20)), max_tokens=4)
        await words.aclose()
    assert sum(len(delta.token_ids) for delta in deltas) == 4
    assert (first.prompt_tokens, first.cached_tokens, first.finish_reason) == (300, 0, "length")
    assert second.prompt_tokens == 300 + 4 + 3
    assert second.cached_tokens >= 256
    assert second.prefilled_tokens == second.prompt_tokens - second.cached_tokens
    assert sum(delta.token_count for delta in spoken) == 4
    assert told.prompt_tokens == 20
