"""Addresses: how they are written, and whether one can be listened on."""

from __future__ import annotations

import errno
import os
import socket

from services.common.errors import ConfigError


def join_host_port(host: str, port: int) -> str:
    """Returns ``host:port``, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def connectable_host(host: str) -> str:
    """Returns the address by which this machine reaches a server that listens on `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)


def check_can_listen(host: str, port: int, flag: str = "--port") -> None:
    """Checks that a server could listen here now.

    gRPC says only that it could not bind, and of a name with several addresses it is content
    with one; so each address is tried with a plain socket first.

    Args:
        host: Address or name to listen on.
        port: Port; 0, a free one, is always possible.
        flag: The flag that the port came from, for the message.

    Raises:
        ConfigError: Somebody else listens there, or the host is not this machine's.
    """
    try:
        found = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as error:
        raise ConfigError(f"--host {host}: {error.strerror}") from error
    for family, kind, proto, _, address in dict.fromkeys(found):
        try:
            with socket.socket(family, kind, proto) as trial:
                # As servers do, so that connections just closed are not in the way.
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    trial.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                trial.bind(address)
        except OSError as error:
            if error.errno == errno.EAFNOSUPPORT:
                continue
            raise listen_error(error, host, port, flag) from error


def listen_error(error: OSError, host: str, port: int, flag: str) -> ConfigError:
    """Returns the line for an address that cannot be listened on.

    Args:
        error: What binding raised.
        host: Address or name to listen on.
        port: Port to listen on.
        flag: The flag that the port came from.
    """
    if error.errno == errno.EADDRNOTAVAIL:
        return ConfigError(f"--host {host}: not an address of this machine")
    reason = os.strerror(error.errno).lower() if error.errno else str(error)
    return ConfigError(f"{flag} {port}: {reason}")
