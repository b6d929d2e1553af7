"""A front that serves in this process, with a fake engine in one of its own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest

from djinn.v1 import inference_service_pb2 as pb
from djinn.v1 import inference_service_pb2_grpc as pb_grpc
from services.common.errors import DjinnError
from services.common.session_token import SessionToken
from services.common.status import error_from_rpc
from services.common.telemetry import Telemetry
from services.worker.config import EngineConfig, WorkerConfig
from services.worker.front.app import Front
from tests.support import fake_engine

ENGINE = EngineConfig(model="dummy:fake", report_interval_s=0.02)
CONFIG = WorkerConfig(engine=ENGINE, port=0, metrics_port=0)


@dataclass
class Running:
    """A front that serves."""

    front: Front
    stop: asyncio.Event
    task: asyncio.Task[int]
    address: str
    channel: grpc.aio.Channel
    stub: Any

    async def generate(self, session: str = "s", **fields: Any) -> list[pb.GenerateResponse]:
        return [response async for response in self.stub.Generate(request(session, **fields))]

    async def error_of(self, **fields: Any) -> DjinnError:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.generate(**fields)
        error = error_from_rpc(caught.value)
        assert error is not None, caught.value
        return error


def request(session: str = "s", *, token: bool = True, **fields: Any) -> pb.GenerateRequest:
    if isinstance(fields.get("append_token_ids"), list):
        fields["append_token_ids"] = pb.TokenIds(ids=fields["append_token_ids"])
    if isinstance(fields.get("full_context"), list):
        fields["full_context"] = pb.TokenIds(ids=fields["full_context"])
    if token:
        fields.setdefault("session_token", SessionToken(session).encode())
    return pb.GenerateRequest(session_id=session, **fields)


@contextlib.asynccontextmanager
async def serving(
    config: WorkerConfig = CONFIG, telemetry: Telemetry | None = None
) -> AsyncIterator[Running]:
    stop = asyncio.Event()
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    front = Front(config, fake_engine.run, telemetry or Telemetry())
    task = asyncio.create_task(front.run(stop, ready.set_result))
    task.add_done_callback(lambda _: ready.done() or ready.cancel())
    await asyncio.wait([ready])
    if task.done():
        task.result()
    async with grpc.aio.insecure_channel(ready.result()) as channel:
        yield Running(
            front, stop, task, ready.result(), channel, pb_grpc.InferenceServiceStub(channel)
        )
        stop.set()
        with contextlib.suppress(DjinnError):
            await task


def tokens_of(responses: list[pb.GenerateResponse]) -> list[int]:
    return [i for r in responses if r.WhichOneof("event") == "delta" for i in r.delta.token_ids]


def text_of(responses: list[pb.GenerateResponse]) -> str:
    return "".join(r.delta.text for r in responses if r.WhichOneof("event") == "delta")
