"""The health service of the gRPC health checking protocol, ended by a drain.

grpcio-health-checking's own keeps each Watch open until the server cancels it, so that one watcher
would make every drain take its whole time; this one says NOT_SERVING and ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any, TypeAlias

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVICE_NAME: str = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN

_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class HealthService(health_pb2_grpc.HealthServicer):
    """Says for each service, and for the whole process as ``""``, whether it serves.

    A part of the process that is ready later than its services has a name of its own.
    """

    def __init__(self, names: Iterable[str], parts: Iterable[str] = ()) -> None:
        """Makes the service, not serving yet.

        Args:
            names: Full names of the process's services.
            parts: Names of parts, each of which serves once the process does and `set_ready` has
                been called for it.
        """
        self._unready = set(parts)
        self._names = frozenset({"", *names, *self._unready})
        self._serving = False
        self._draining = False
        self._changed = asyncio.Event()

    def set_serving(self, serving: bool) -> None:
        """Sets what is said of every service; has no effect once `drain` was called."""
        if self._draining or serving == self._serving:
            return
        self._serving = serving
        self._announce()

    def set_ready(self, part: str) -> None:
        """Says that a part is ready, for good."""
        if part in self._unready:
            self._unready.discard(part)
            self._announce()

    def drain(self) -> None:
        """Says NOT_SERVING from now on and ends every Watch."""
        self._draining = True
        self._serving = False
        self._announce()

    def _announce(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _status(self, name: str) -> int:
        if name not in self._names:
            return _SERVICE_UNKNOWN
        return _SERVING if self._serving and name not in self._unready else _NOT_SERVING

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: _Context
    ) -> health_pb2.HealthCheckResponse:
        status = self._status(request.service)
        if status == _SERVICE_UNKNOWN:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service {request.service!r}")
        return health_pb2.HealthCheckResponse(status=status)

    async def List(self, request: Any, context: _Context) -> Any:
        # Newer than the published types.
        return health_pb2.HealthListResponse(  # type: ignore[attr-defined]
            statuses={
                name: health_pb2.HealthCheckResponse(status=self._status(name))
                for name in self._names
            }
        )

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: _Context) -> None:
        last: int | None = None
        while True:
            changed = self._changed
            status = self._status(request.service)
            if status != last:
                await context.write(health_pb2.HealthCheckResponse(status=status))
                last = status
            if self._draining:
                return
            await changed.wait()
