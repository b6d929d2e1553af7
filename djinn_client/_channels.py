"""One gRPC channel per endpoint, shared by all sessions of a client."""

from __future__ import annotations

import asyncio

import grpc
import grpc.aio

# A killed server that comes back is found within a second, a host that vanished without a word
# within half a minute. Messages may hold a whole context of token ids or, for verification, logits:
# the servers bound what they accept.
_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
)


class Channels:
    """Opens channels on demand and closes them together."""

    def __init__(self, credentials: grpc.ChannelCredentials | None) -> None:
        self._credentials = credentials
        self._by_endpoint: dict[str, grpc.aio.Channel] = {}
        self._closed = False

    def get(self, endpoint: str) -> grpc.aio.Channel:
        """Returns the channel to an endpoint, made if this is the first time.

        Raises:
            RuntimeError: All channels have been closed.
        """
        self.check_open()
        channel = self._by_endpoint.get(endpoint)
        if channel is None:
            if self._credentials is None:
                channel = grpc.aio.insecure_channel(endpoint, options=_OPTIONS)
            else:
                channel = grpc.aio.secure_channel(endpoint, self._credentials, options=_OPTIONS)
            self._by_endpoint[endpoint] = channel
        return channel

    def check_open(self) -> None:
        """Raises `RuntimeError` if all channels have been closed."""
        if self._closed:
            raise RuntimeError("the client is closed")

    async def aclose(self) -> None:
        """Closes all channels, cancelling what runs on them. Idempotent."""
        self._closed = True
        channels = list(self._by_endpoint.values())
        self._by_endpoint.clear()
        await asyncio.gather(*(channel.close() for channel in channels))
