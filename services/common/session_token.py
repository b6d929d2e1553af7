"""The session token: what a client carries so that a session survives who has forgotten it.

The scheduler makes it, clients send it back unread, and a worker or a restarted scheduler makes
the session from it. It is JSON, so that an operator can read one; it is not a secret and grants
nothing that the session id alone would not.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import msgspec

from services.common.errors import InvalidRequestError

MAX_TOKEN_BYTES = 4096
_SESSION_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}", re.ASCII)


def check_session_id(session_id: str) -> str:
    """Returns the id if it is one.

    Args:
        session_id: What a client sent.

    Raises:
        InvalidRequestError: It is not 1 to 128 characters of ``[A-Za-z0-9._:-]``.
    """
    if _SESSION_ID.fullmatch(session_id) is None:
        shown = session_id if len(session_id) <= 40 else f"{session_id[:40]}…"
        raise InvalidRequestError.of_field(
            "session_id",
            f"{shown!r} ({len(session_id)} characters) is not 1 to 128 characters of "
            "[A-Za-z0-9._:-]",
        )
    return session_id


@dataclass(frozen=True, slots=True)
class SessionToken:
    """What is needed to make a session anew.

    Attributes:
        session_id: The session.
        tenant_id: Whose it is; empty is the default tenant.
        cache_salt: Blocks are shared only between sessions of one salt.
        priority: -100 to 100; larger is served earlier.
        name: A name for people.
        worker_id: Where it was placed last; empty: nowhere.
        opened_unix_ns: When it was opened, in wall-clock nanoseconds since the epoch.
    """

    session_id: str
    tenant_id: str = ""
    cache_salt: str = ""
    priority: int = 0
    name: str = ""
    worker_id: str = ""
    opened_unix_ns: int = 0

    def encode(self) -> bytes:
        """Returns the token as bytes for the wire."""
        return msgspec.json.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> SessionToken:
        """Returns the token in `data`; fields it does not know are skipped.

        Raises:
            InvalidRequestError: `data` is not a token; names the field ``session_token``.
        """
        if len(data) > MAX_TOKEN_BYTES:
            raise InvalidRequestError.of_field(
                "session_token", f"{len(data)} bytes, at most {MAX_TOKEN_BYTES} are possible"
            )
        try:
            token = _decoder.decode(data)
            check_session_id(token.session_id)
        except (msgspec.MsgspecError, UnicodeDecodeError, InvalidRequestError) as error:
            raise InvalidRequestError.of_field(
                "session_token", f"not one that OpenSession gave: {error}"
            ) from error
        return token


_decoder = msgspec.json.Decoder(SessionToken)
