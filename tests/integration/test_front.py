"""A whole front process's parts, with a fake engine in a process of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import grpc
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import generate_latest

from djinn.v1 import inference_service_pb2 as pb
from services.common.errors import ConfigError, EngineLostError
from services.common.session_token import SessionToken
from services.common.status import error_from_rpc
from services.common.telemetry import Telemetry
from services.worker.front.app import HOST_POOL_HEALTH, Front
from tests.support import fake_engine
from tests.support.front import CONFIG, ENGINE, Running, request, serving, tokens_of

SERVING = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)
NOT_SERVING = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.NOT_SERVING)


async def health_watch(worker: Running, service: str = "djinn.v1.InferenceService") -> Any:
    stub: Any = health_pb2_grpc.HealthStub(worker.channel)  # its types know no Watch
    return stub.Watch(health_pb2.HealthCheckRequest(service=service))


@pytest.fixture
async def worker() -> AsyncIterator[Running]:
    async with serving() as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_worker() -> AsyncIterator[Running]:
    async with serving() as running:
        yield running


async def test_generate_streams_started_deltas_and_finished(worker: Running) -> None:
    responses = await worker.generate(append_token_ids=[5, 6, 7], max_tokens=5)
    assert responses[0].started.appended_token_ids == [5, 6, 7]
    assert responses[0].started.context_length == 3
    assert tokens_of(responses) == [5, 6, 7, 5, 6]
    finished = responses[-1].finished
    assert finished.reason == pb.FINISH_REASON_LENGTH
    assert finished.context_length == 8
    assert finished.usage.prompt_tokens == 3
    assert finished.usage.completion_tokens == 5


async def test_a_session_continues_where_it_was(worker: Running) -> None:
    await worker.generate(append_token_ids=[5, 6], max_tokens=2)
    responses = await worker.generate(append_token_ids=[9], max_tokens=1, expected_context_length=4)
    assert responses[0].started.context_length == 5
    assert responses[-1].finished.usage.cached_tokens == 4


async def test_a_wrong_expectation_is_a_context_mismatch(worker: Running) -> None:
    error = await worker.error_of(append_token_ids=[5], expected_context_length=3)
    assert (error.code, error.reason) == ("FAILED_PRECONDITION", "CONTEXT_MISMATCH")


async def test_logprobs_and_logits_come_one_per_token(worker: Running) -> None:
    responses = await worker.generate(
        append_token_ids=[1], max_tokens=40, logprobs=1, return_logits=True
    )
    deltas = [r.delta for r in responses if r.WhichOneof("event") == "delta"]
    assert sum(len(delta.token_ids) for delta in deltas) == 40
    for delta in deltas:
        assert len(delta.logprobs) == len(delta.logits) == len(delta.token_ids)
        assert all(len(logits) == 4 * fake_engine.VOCAB_SIZE for logits in delta.logits)
    assert deltas[0].logprobs[0].top[0].logprob == -0.5


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ({"session": "no spaces"}, "INVALID_ARGUMENT", ["session_id", "no spaces", "128"]),
        ({"session_token": b"junk"}, "INVALID_ARGUMENT", ["session_token"]),
        (
            {"session_token": SessionToken("other").encode()},
            "INVALID_ARGUMENT",
            ["session_token", "other"],
        ),
        ({"append_token_ids": []}, "INVALID_ARGUMENT", ["empty prompt"]),
        ({}, "INVALID_ARGUMENT", ["empty prompt"]),
        ({"append_text": ""}, "INVALID_ARGUMENT", ["append_text", "empty prompt"]),
        ({"append_token_ids": [1, 400]}, "INVALID_ARGUMENT", ["400", "399", "append_token_ids"]),
        ({"append_token_ids": [-1]}, "INVALID_ARGUMENT", ["-1", "399"]),
        ({"full_context": [1, 999]}, "INVALID_ARGUMENT", ["full_context", "999"]),
        ({"append_token_ids": [1] * 1000}, "OUT_OF_RANGE", ["1000"]),
        ({"append_token_ids": [1], "max_tokens": 0}, "INVALID_ARGUMENT", ["max_tokens: 0", "1"]),
        ({"append_token_ids": [1], "max_tokens": -3}, "INVALID_ARGUMENT", ["max_tokens: -3"]),
        ({"append_token_ids": [1], "logprobs": 21}, "INVALID_ARGUMENT", ["logprobs: 21", "20"]),
        (
            {"append_token_ids": [1], "sampling": pb.SamplingParams(temperature=float("nan"))},
            "INVALID_ARGUMENT",
            ["temperature", "nan", "100"],
        ),
        (
            {"append_token_ids": [1], "sampling": pb.SamplingParams(temperature=-0.5)},
            "INVALID_ARGUMENT",
            ["temperature", "-0.5"],
        ),
        (
            {"append_token_ids": [1], "sampling": pb.SamplingParams(top_k=0)},
            "INVALID_ARGUMENT",
            ["top_k", "0"],
        ),
        (
            {"append_token_ids": [1], "sampling": pb.SamplingParams(top_p=1.5)},
            "INVALID_ARGUMENT",
            ["top_p", "1.5"],
        ),
        ({"append_token_ids": [1], "stop_token_ids": [400]}, "INVALID_ARGUMENT", ["400"]),
        (
            {"append_token_ids": [1], "stop_strings": ["x"]},
            "FAILED_PRECONDITION",
            ["stop_strings", "tokenizer"],
        ),
        ({"append_text": "hello"}, "FAILED_PRECONDITION", ["append_text", "tokenizer"]),
    ],
)
@pytest.mark.asyncio(loop_scope="module")
async def test_bad_input_is_refused_by_name(
    shared_worker: Running, fields: dict[str, Any], code: str, words: list[str]
) -> None:
    error = await shared_worker.error_of(**fields)
    assert error.code == code
    for word in words:
        assert word in error.message
    assert "\n" not in error.message


async def test_an_unknown_session_without_a_token_is_not_found(worker: Running) -> None:
    error = await worker.error_of(session="ghost", token=False, append_token_ids=[1])
    assert (error.code, error.reason) == ("NOT_FOUND", "SESSION_UNKNOWN")
    assert "ghost" in error.message


async def test_a_second_generate_on_a_session_is_refused_and_harms_nobody(worker: Running) -> None:
    first = worker.stub.Generate(request(append_token_ids=[fake_engine.HANG]))
    await first.read()
    error = await worker.error_of(append_token_ids=[1])
    assert error.reason == "SESSION_BUSY"
    assert tokens_of(await worker.generate("other", append_token_ids=[8], max_tokens=2)) == [8, 8]
    first.cancel()


async def test_cancelling_a_call_ends_the_request_in_the_engine(worker: Running) -> None:
    call = worker.stub.Generate(request(append_token_ids=[fake_engine.HANG]))
    await call.read()
    assert worker.front._engine.running == 1
    call.cancel()
    await worker.front._engine.wait_idle()
    # Its session is free again, and holds the prompt.
    responses = await worker.generate(append_token_ids=[3], max_tokens=1)
    assert responses[0].started.context_length == 2


async def test_what_a_slow_client_left_waiting_comes_as_one_delta(worker: Running) -> None:
    call = worker.stub.Generate(request(append_token_ids=[1, fake_engine.FLOOD], max_tokens=900))
    responses = [response async for response in call]
    assert len(tokens_of(responses)) == 900
    assert len(responses) == 3


async def test_a_bug_in_the_engine_fails_one_request_only(worker: Running) -> None:
    error = await worker.error_of(append_token_ids=[fake_engine.REFUSE])
    assert error.code == "INTERNAL"
    assert tokens_of(await worker.generate(append_token_ids=[8], max_tokens=1)) == [8]


@pytest.mark.parametrize("magic", [fake_engine.CRASH, fake_engine.BUG])
async def test_a_dead_engine_fails_every_request_and_ends_the_front(
    worker: Running, magic: int
) -> None:
    calls = [
        worker.stub.Generate(request(f"s{i}", append_token_ids=[fake_engine.HANG]))
        for i in range(3)
    ]
    for call in calls:
        await call.read()
    error = await worker.error_of(append_token_ids=[magic])
    assert (error.code, error.reason) == ("UNAVAILABLE", "ENGINE_LOST")
    for call in calls:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert await worker.task == 1


async def test_the_host_pool_is_healthy_once_the_engine_reports_all_of_it() -> None:
    async with serving() as worker:
        watch = await health_watch(worker, HOST_POOL_HEALTH)
        heard = [await watch.read()]
        while heard[-1] != SERVING:
            heard.append(await watch.read())
        assert heard in ([SERVING], [NOT_SERVING, SERVING])


async def test_draining_lets_running_requests_end_and_refuses_new_ones() -> None:
    async with serving(replace(CONFIG, drain_timeout_s=60)) as worker:
        call = worker.stub.Generate(request("long", append_token_ids=[fake_engine.HANG]))
        await call.read()
        watch = await health_watch(worker)
        assert await watch.read() == SERVING
        worker.stop.set()
        assert await watch.read() == NOT_SERVING
        error = await worker.error_of(append_token_ids=[1])
        assert (error.code, error.reason) == ("UNAVAILABLE", "DRAINING")
        assert not worker.task.done()
        call.cancel()
        assert await worker.task == 0


async def test_draining_gives_up_on_requests_that_take_too_long() -> None:
    async with serving(replace(CONFIG, drain_timeout_s=0.0)) as worker:
        call = worker.stub.Generate(request(append_token_ids=[fake_engine.HANG]))
        await call.read()
        worker.stop.set()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        error = error_from_rpc(caught.value)
        assert error is not None
        assert error.reason == "DRAINING"
        assert await worker.task == 0


async def test_get_model_and_metrics(worker: Running) -> None:
    answer = await worker.stub.GetModel(pb.GetModelRequest())
    assert answer.worker_id == "worker-0"
    assert answer.model.vocab_size == fake_engine.VOCAB_SIZE
    assert not answer.model.has_tokenizer
    await worker.generate(append_token_ids=[1, 2], max_tokens=3)
    await worker.error_of(append_token_ids=[1], max_tokens=0)
    text = generate_latest(worker.front._metrics.registry).decode()
    for line in (
        'gen_ai_server_time_to_first_token_seconds_count{gen_ai_request_model="dummy:fake"} 1.0',
        'djinn_requests_refused_total{reason="INVALID_REQUEST"} 1.0',
        'djinn_blocks{pool="device",state="reclaimable"} 15.0',
        'djinn_kv_bytes_total{direction="load"} 5000.0',
        "djinn_stores_total 7.0",
    ):
        assert line in text
    swap_pool = worker.front._metrics.vmu()["semantic_scheduler"]["swap_pool"]  # type: ignore[index]
    assert swap_pool["swaps_performed"] == 7
    assert swap_pool["pool_bytes_total"] == 200 * 1024


@pytest.mark.parametrize(("dtype", "message"), [("fail", "--dtype fail"), ("die", "exit code 4")])
async def test_an_engine_that_cannot_start_ends_the_front(dtype: str, message: str) -> None:
    config = replace(CONFIG, engine=replace(ENGINE, dtype=dtype))
    expected = ConfigError if dtype == "fail" else EngineLostError
    with pytest.raises(expected, match=message):
        async with serving(config):
            pass


async def test_stopping_before_the_engine_is_ready_ends_well() -> None:
    stop = asyncio.Event()
    config = replace(CONFIG, engine=replace(ENGINE, dtype="stall"))
    front = Front(config, fake_engine.run, Telemetry())
    stop.set()
    assert await front.run(stop, pytest.fail) == 0


async def test_a_busy_port_is_refused_before_the_engine_starts(worker: Running) -> None:
    port = int(worker.address.rpartition(":")[2])
    with pytest.raises(ConfigError, match=f"--port {port}"):
        await Front(replace(CONFIG, port=port), fake_engine.run, Telemetry()).run(
            asyncio.Event(), lambda address: None
        )
