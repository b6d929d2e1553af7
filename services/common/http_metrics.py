"""The HTTP endpoint of a process: Prometheus metrics, the seed's JSON, and a liveness check."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

from aiohttp import web
from aiohttp.http import HttpProcessingError
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from services.common.network import check_can_listen, join_host_port, listen_error

_logger = logging.getLogger(__name__)


class _RequestLog(logging.LoggerAdapter[logging.Logger]):
    """What aiohttp logs of requests: those that are no HTTP, as a gRPC client's, in a line."""

    def exception(self, msg: object, *args: object, exc_info: Any = True, **kwargs: Any) -> None:
        if isinstance(exc_info, HttpProcessingError):
            said = exc_info.message.strip().partition("\n")[0]
            _logger.debug("a request that is no HTTP: %s", said)
        else:
            super().exception(msg, *args, exc_info=exc_info, **kwargs)


class MetricsServer:
    """Serves ``/metrics`` (Prometheus or OpenMetrics text), ``/metrics/vmu`` (JSON), ``/healthz``.

    Attributes:
        host: Address it listens on.
        port: Port it listens on; 0 until `start` if a free one was asked for.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        vmu: Callable[[], Mapping[str, object]],
        host: str,
        port: int,
        *,
        healthy: Callable[[], bool] = lambda: True,
        port_flag: str = "--metrics-port",
    ) -> None:
        """Makes the server; `start` starts it.

        Args:
            registry: What ``/metrics`` shows.
            vmu: Returns what ``/metrics/vmu`` shows; called in the event loop for each request.
            host: Address to listen on.
            port: Port to listen on; 0 takes a free one.
            healthy: What ``/healthz`` answers: 200 if True, else 503.
            port_flag: The flag that the port came from, for the message of a busy one.
        """
        self._registry = registry
        self._vmu = vmu
        self._healthy = healthy
        self._port_flag = port_flag
        self.host = host
        self.port = port
        app = web.Application()
        app.router.add_get("/metrics", self._serve_metrics)
        app.router.add_get("/metrics/vmu", self._serve_vmu)
        app.router.add_get("/healthz", self._serve_healthz)
        self._runner = web.AppRunner(
            app, access_log=None, shutdown_timeout=1.0, logger=_RequestLog(_logger)
        )

    @property
    def address(self) -> str:
        """``host:port`` as it listens."""
        return join_host_port(self.host, self.port)

    async def start(self) -> None:
        """Starts listening.

        Raises:
            ConfigError: The address cannot be listened on.
        """
        check_can_listen(self.host, self.port, self._port_flag)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self.host or None, self.port, reuse_port=False)
        try:
            await site.start()
        except OSError as error:
            await self._runner.cleanup()
            raise listen_error(error, self.host, self.port, self._port_flag) from error
        self.port = self._runner.addresses[0][1]
        _logger.info("metrics on http://%s/metrics", self.address)

    async def stop(self) -> None:
        """Stops listening; does nothing if it never began."""
        await self._runner.cleanup()

    async def _serve_metrics(self, request: web.Request) -> web.Response:
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encode(self._registry), headers={"Content-Type": content_type})

    async def _serve_vmu(self, request: web.Request) -> web.Response:
        return web.json_response(self._vmu(), dumps=_line)

    async def _serve_healthz(self, request: web.Request) -> web.Response:
        if self._healthy():
            return web.Response(text="ok\n")
        return web.Response(text="not serving\n", status=503)


def _line(document: object) -> str:
    return json.dumps(document) + "\n"
