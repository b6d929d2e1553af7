from __future__ import annotations

import socket

import pytest

from services.common.errors import ConfigError
from services.common.network import check_can_listen, connectable_host, join_host_port


@pytest.fixture
def taken() -> object:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", ""])
def test_a_port_taken_on_one_address_is_taken(taken: int, host: str) -> None:
    with pytest.raises(ConfigError, match=rf"^--worker-port {taken}: address already in use$"):
        check_can_listen(host, taken, "--worker-port")


def test_a_free_port_stays_free() -> None:
    check_can_listen("127.0.0.1", 0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

    check_can_listen("127.0.0.1", port)
    check_can_listen("127.0.0.1", port)


@pytest.mark.parametrize("host", ["no such host", "192.0.2.1"])
def test_a_host_that_is_not_ours_is_named(host: str) -> None:
    with pytest.raises(ConfigError, match=f"^--host {host}: "):
        check_can_listen(host, 0)


def test_addresses_are_written_as_urls_have_them() -> None:
    assert join_host_port("localhost", 5556) == "localhost:5556"
    assert join_host_port("::1", 5556) == "[::1]:5556"


@pytest.mark.parametrize(
    ("host", "reached"),
    [("0.0.0.0", "127.0.0.1"), ("::", "::1"), ("", "127.0.0.1"), ("10.0.0.7", "10.0.0.7")],
)
def test_a_wildcard_is_reached_by_loopback(host: str, reached: str) -> None:
    assert connectable_host(host) == reached
