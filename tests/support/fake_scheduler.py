"""A scheduler that does only what a test tells it to, at the end of real control streams."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc

from djinn.v1 import control_service_pb2 as pb
from djinn.v1 import control_service_pb2_grpc as pb_grpc


class WorkerStream:
    """One worker's stream: what it sent, and what to send it."""

    def __init__(self) -> None:
        self.received: asyncio.Queue[pb.ConnectRequest] = asyncio.Queue()
        self.outgoing: asyncio.Queue[pb.ConnectResponse | None] = asyncio.Queue()

    async def next(self, kind: str) -> Any:
        """Returns the next message of one kind, skipping others."""
        while True:
            message = await self.received.get()
            if message.WhichOneof("message") == kind:
                return getattr(message, kind)

    def welcome(
        self, epoch: str = "epoch", interval_s: float = 30.0, mode: pb.WorkerMode | None = None
    ) -> None:
        welcome = pb.Welcome(scheduler_epoch=epoch, mode=mode)
        welcome.report_interval.FromNanoseconds(round(interval_s * 1e9))
        self.outgoing.put_nowait(pb.ConnectResponse(welcome=welcome))

    def command(self, command_id: str = "c", session_id: str = "s", **fields: Any) -> None:
        command = pb.Command(command_id=command_id, session_id=session_id, **fields)
        self.outgoing.put_nowait(pb.ConnectResponse(command=command))

    def end(self) -> None:
        self.outgoing.put_nowait(None)


class FakeScheduler(pb_grpc.WorkerControlServiceServicer):
    """Hands each stream to the test."""

    def __init__(self) -> None:
        self.streams: asyncio.Queue[WorkerStream] = asyncio.Queue()

    async def Connect(
        self, request_iterator: AsyncIterator[pb.ConnectRequest], context: Any
    ) -> AsyncIterator[pb.ConnectResponse]:
        stream = WorkerStream()
        self.streams.put_nowait(stream)

        async def take() -> None:
            async for message in request_iterator:
                stream.received.put_nowait(message)

        taking = asyncio.ensure_future(take())
        try:
            while (message := await stream.outgoing.get()) is not None:
                yield message
        finally:
            taking.cancel()

    @contextlib.asynccontextmanager
    async def serving(self, port: int = 0) -> AsyncIterator[int]:
        """Serves on a port; yields it."""
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        pb_grpc.add_WorkerControlServiceServicer_to_server(self, server)
        bound = server.add_insecure_port(f"127.0.0.1:{port}")
        await server.start()
        try:
            yield bound
        finally:
            await server.stop(None)
