"""Every error a Djinn service can answer with, and what it means to a client.

::

    DjinnError
    ├── InvalidRequestError      INVALID_ARGUMENT     the request is wrong by itself
    ├── UnknownSessionError      NOT_FOUND
    ├── UnknownWorkerError       NOT_FOUND
    ├── SessionExistsError       ALREADY_EXISTS       another tenant has the id
    ├── WrongStateError          FAILED_PRECONDITION  right request, wrong moment
    │   ├── ContextMismatchError                      the client's context is not the worker's
    │   ├── SessionBusyError                          a Generate is running
    │   ├── SessionClosedError
    │   ├── StaleGenerationError                      the session has moved on
    │   └── UnsupportedError                          this model or worker cannot do that
    ├── ContextTooLongError      OUT_OF_RANGE
    ├── ExhaustedError           RESOURCE_EXHAUSTED   full; carries when to retry
    ├── UnavailableError         UNAVAILABLE          retry elsewhere or later
    │   ├── DrainingError
    │   ├── NoWorkerError
    │   └── EngineLostError
    ├── CancelledError           CANCELLED
    ├── CommandTimeoutError      DEADLINE_EXCEEDED
    └── InternalError            INTERNAL             a bug; its stack is in the log

    ConfigError                  (never on the wire)  bad flags, files or models at start

An error crosses the two worker processes as an `ErrorInfo` and the network as a
`google.rpc.Status` with a `google.rpc.ErrorInfo` of domain `djinn.v1`. `reason` is the stable
part that programs match on; the message is one line for people and names the value and the limit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

DOMAIN = "djinn.v1"


@dataclass(frozen=True, slots=True)
class ErrorInfo:
    """A `DjinnError` as plain data.

    Attributes:
        code: Name of the gRPC status code, such as ``"NOT_FOUND"``.
        reason: Stable upper-case name of what went wrong.
        message: One line for people.
        metadata: Values a program may want, such as the field or the limit.
        retry_after_s: When to try again, if that may help.
    """

    code: str
    reason: str
    message: str
    metadata: dict[str, str] = field(default_factory=dict)
    retry_after_s: float | None = None


class DjinnError(Exception):
    """Base of all errors that are part of the protocol."""

    code: ClassVar[str] = "INTERNAL"
    reason: ClassVar[str] = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.metadata = dict(metadata or {})
        self.retry_after_s = retry_after_s

    def to_info(self) -> ErrorInfo:
        """Returns the error as plain data."""
        return ErrorInfo(self.code, self.reason, self.message, self.metadata, self.retry_after_s)


class InvalidRequestError(DjinnError):
    """A field of the request can never be right; `field` names it."""

    code = "INVALID_ARGUMENT"
    reason = "INVALID_REQUEST"

    @classmethod
    def of_field(cls, field_name: str, problem: str) -> InvalidRequestError:
        """Returns the error for one field: ``"<field>: <problem>"``."""
        return cls(f"{field_name}: {problem}", metadata={"field": field_name})


class UnknownSessionError(DjinnError):
    """No open session has this id."""

    code = "NOT_FOUND"
    reason = "SESSION_UNKNOWN"

    @classmethod
    def of(cls, session_id: str) -> UnknownSessionError:
        """Returns the error for one id."""
        return cls(f"no session {session_id!r}", metadata={"session_id": session_id})


class UnknownWorkerError(DjinnError):
    """No connected worker has this id."""

    code = "NOT_FOUND"
    reason = "WORKER_UNKNOWN"


class SessionExistsError(DjinnError):
    """The session id belongs to another tenant."""

    code = "ALREADY_EXISTS"
    reason = "SESSION_EXISTS"


class WrongStateError(DjinnError):
    """The request could be right at another moment."""

    code = "FAILED_PRECONDITION"
    reason = "WRONG_STATE"


class ContextMismatchError(WrongStateError):
    """The client's idea of the context is not the worker's: send `full_context`."""

    reason = "CONTEXT_MISMATCH"


class SessionBusyError(WrongStateError):
    """The session runs a Generate already."""

    reason = "SESSION_BUSY"


class SessionClosedError(WrongStateError):
    """The session has ended."""

    reason = "SESSION_CLOSED"


class StaleGenerationError(WrongStateError):
    """The session has moved on since the command was decided."""

    reason = "STALE_GENERATION"


class UnsupportedError(WrongStateError):
    """This model or worker cannot do what was asked."""

    reason = "UNSUPPORTED"


class ContextTooLongError(DjinnError):
    """Prompt and output do not fit the model or the pool; `limit` is the most that would."""

    code = "OUT_OF_RANGE"
    reason = "CONTEXT_TOO_LONG"


class ExhaustedError(DjinnError):
    """No more is admitted now; `retry_after_s` says when it may be."""

    code = "RESOURCE_EXHAUSTED"
    reason = "EXHAUSTED"


class UnavailableError(DjinnError):
    """Not now or not here; another try may succeed."""

    code = "UNAVAILABLE"
    reason = "UNAVAILABLE"


class DrainingError(UnavailableError):
    """The process is about to stop and takes no new work."""

    reason = "DRAINING"


class NoWorkerError(UnavailableError):
    """No worker is connected that could serve this."""

    reason = "NO_WORKER"


class EngineLostError(UnavailableError):
    """The engine process ended while it had this request."""

    reason = "ENGINE_LOST"


class CancelledError(DjinnError):
    """The client, or the end of the session, cancelled the request."""

    code = "CANCELLED"
    reason = "CANCELLED"


class CommandTimeoutError(DjinnError):
    """A command was not done by its deadline."""

    code = "DEADLINE_EXCEEDED"
    reason = "COMMAND_TIMEOUT"


class InternalError(DjinnError):
    """A bug of Djinn's."""


class ConfigError(Exception):
    """The process cannot start as it was told to: one line naming the value and what is allowed."""


def _tree(root: type[DjinnError]) -> dict[str, type[DjinnError]]:
    found = {root.reason: root}
    for child in root.__subclasses__():
        found.update(_tree(child))
    return found


def from_info(info: ErrorInfo) -> DjinnError:
    """Returns the error that `info` describes; `InternalError` for a reason not in the tree."""
    kind = _tree(DjinnError).get(info.reason, InternalError)
    return kind(info.message, metadata=info.metadata, retry_after_s=info.retry_after_s)
