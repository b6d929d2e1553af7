"""A gRPC server as every Djinn service has it: health, reflection, errors, tracing, drain."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from services.common import health
from services.common.errors import ConfigError
from services.common.interceptor import BoundaryInterceptor
from services.common.network import check_can_listen, join_host_port

MAX_MESSAGE_BYTES = 64 * 2**20

# Both sides ask after an idle connection every 20 s and give it up 10 s later, so that a peer that
# vanished without a word is noticed in half a minute.
_COMMON_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)
CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    *_COMMON_OPTIONS,
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)
SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    *_COMMON_OPTIONS,
    # A second server on the same port shall fail, not share it.
    ("grpc.so_reuseport", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
)

_logger = logging.getLogger(__name__)


class GrpcServer:
    """A started server.

    Attributes:
        host: Address it listens on.
        port: Port it listens on; never 0.
    """

    def __init__(
        self, server: grpc.aio.Server, service: health.HealthService, host: str, port: int
    ) -> None:
        """Wraps a server that listens already; `serve` makes one."""
        self._server = server
        self._health = service
        self.host = host
        self.port = port

    @property
    def address(self) -> str:
        """``host:port`` as it listens."""
        return join_host_port(self.host, self.port)

    def set_serving(self, serving: bool) -> None:
        """Sets what the health service says of the process and of each of its services."""
        self._health.set_serving(serving)

    def set_ready(self, part: str) -> None:
        """Lets the health service say of a part, from now on, what it says of the process."""
        self._health.set_ready(part)

    async def stop(self, drain_s: float) -> None:
        """Stops: says NOT_SERVING, takes no new calls, waits for those that run, cancels the rest.

        Args:
            drain_s: How long calls may go on, in seconds. Streams that live as long as the
                connection, other than the health service's own, must be ended by their servicer.
        """
        self._health.drain()
        await self._server.stop(drain_s)

    async def wait(self) -> None:
        """Waits until the server has stopped."""
        await self._server.wait_for_termination()


async def serve(
    servicers: Sequence[tuple[Callable[[Any, grpc.aio.Server], None], object]],
    names: Sequence[str],
    host: str,
    port: int,
    *,
    port_flag: str = "--port",
    serving: bool = True,
    parts: Sequence[str] = (),
    options: Sequence[tuple[str, int]] = (),
) -> GrpcServer:
    """Starts a server with health and reflection besides the services it is given.

    Args:
        servicers: Pairs of a generated ``add_…Servicer_to_server`` and the servicer. Handlers are
            coroutines or asynchronous generators; they raise `DjinnError` to fail a call, and run
            with the trace context of the call's metadata as current context.
        names: Full names of the services, such as ``djinn.v1.AgentService``.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        port_flag: The flag that the port came from, for the message of a busy one.
        serving: What health says from the start; False until something else is ready too.
        parts: Names that health knows besides, not serving before `GrpcServer.set_ready`.
        options: gRPC server options that go before `SERVER_OPTIONS`.

    Raises:
        ConfigError: The address cannot be listened on.
    """
    check_can_listen(host, port, port_flag)
    overridden = {key for key, _ in options}
    server = grpc.aio.server(
        interceptors=(BoundaryInterceptor(),),
        options=(*options, *(item for item in SERVER_OPTIONS if item[0] not in overridden)),
    )
    for add, servicer in servicers:
        add(servicer, server)
    service = health.HealthService(names, parts)
    health_pb2_grpc.add_HealthServicer_to_server(service, server)
    reflection.enable_server_reflection(
        (*names, health.SERVICE_NAME, reflection.SERVICE_NAME), server
    )
    try:
        bound = server.add_insecure_port(join_host_port(host, port))
    except RuntimeError as error:
        raise ConfigError(f"{port_flag} {port}: cannot listen on {host}") from error
    await server.start()
    service.set_serving(serving)
    started = GrpcServer(server, service, host, bound)
    _logger.info("gRPC on %s: %s", started.address, ", ".join(names))
    return started
