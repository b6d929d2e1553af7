"""Everything the client can raise.

::

    DjinnError                     .message .reason .metadata .retry_after_s
    ├── InvalidRequestError        the request is wrong by itself; .field names the culprit
    ├── SessionNotFoundError       no open session has this id
    ├── WorkerNotFoundError        no connected worker has this id
    ├── SessionExistsError         another tenant has the id
    ├── WrongStateError            right request, wrong moment
    │   ├── ContextMismatchError   the worker's context is another (the client mends this itself)
    │   ├── SessionBusyError       the session runs a generation already
    │   ├── SessionClosedError     the session has ended
    │   ├── StaleGenerationError   the session has moved on since a command was decided
    │   └── UnsupportedError       this model or worker cannot do that
    ├── ContextTooLongError        prompt and output do not fit; .limit is the most that would
    ├── ExhaustedError             full; .retry_after_s says when to try again
    ├── UnavailableError           not now or not here (retried by the client before it is raised)
    │   ├── ConnectError           nobody answers at the address, or the connection broke
    │   ├── DrainingError          the process is about to stop
    │   ├── NoWorkerError          no worker is connected
    │   └── EngineLostError        the worker lost its engine while it had the request
    ├── GenerationCancelledError   somebody else cancelled it, or closed the session
    ├── DeadlineExceededError      not done within the time given
    └── InternalError              a bug; its stack is in the server's log

Servers send a `google.rpc.Status` with a `google.rpc.ErrorInfo` of domain ``djinn.v1``, whose
`reason` picks the class. An answer without one, from a proxy or a broken connection, is picked by
its status code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

_DOMAIN: Final = "djinn.v1"
_DETAILS_KEY: Final = "grpc-status-details-bin"


class DjinnError(Exception):
    """Base of everything the client raises on purpose.

    Attributes:
        message: One line for people; names the value and the limit.
        reason: Stable upper-case name of what went wrong.
        metadata: Values a program may want.
        retry_after_s: When to try again, in seconds, if that may help.
    """

    reason: str = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or type(self).reason
        self.metadata = dict(metadata or {})
        self.retry_after_s = retry_after_s


class InvalidRequestError(DjinnError):
    """A field of the request can never be right."""

    reason = "INVALID_REQUEST"

    @property
    def field(self) -> str:
        """Name of the field; empty if the server did not say."""
        return self.metadata.get("field", "")

    @classmethod
    def of_field(cls, field: str, problem: str) -> InvalidRequestError:
        """Returns the error for one field: ``"<field>: <problem>"``."""
        return cls(f"{field}: {problem}", metadata={"field": field})


class SessionNotFoundError(DjinnError):
    """No open session has this id."""

    reason = "SESSION_UNKNOWN"


class WorkerNotFoundError(DjinnError):
    """No connected worker has this id."""

    reason = "WORKER_UNKNOWN"


class SessionExistsError(DjinnError):
    """The session id belongs to another tenant."""

    reason = "SESSION_EXISTS"


class WrongStateError(DjinnError):
    """The request could be right at another moment."""

    reason = "WRONG_STATE"


class ContextMismatchError(WrongStateError):
    """The client's idea of the context is not the worker's."""

    reason = "CONTEXT_MISMATCH"


class SessionBusyError(WrongStateError):
    """The session runs a generation already."""

    reason = "SESSION_BUSY"


class SessionClosedError(WrongStateError):
    """The session has ended, or was never opened."""

    reason = "SESSION_CLOSED"


class StaleGenerationError(WrongStateError):
    """The session has moved on since the command was decided."""

    reason = "STALE_GENERATION"


class UnsupportedError(WrongStateError):
    """This model or worker cannot do what was asked."""

    reason = "UNSUPPORTED"


class ContextTooLongError(DjinnError):
    """Prompt and output do not fit the model or the worker's pool."""

    reason = "CONTEXT_TOO_LONG"

    @property
    def limit(self) -> int | None:
        """Most tokens that would fit; None if the server did not say."""
        value = self.metadata.get("limit", "")
        return int(value) if value.isdigit() else None


class ExhaustedError(DjinnError):
    """No more is admitted now; `retry_after_s` says when it may be."""

    reason = "EXHAUSTED"


class UnavailableError(DjinnError):
    """Not now or not here; another try may succeed."""

    reason = "UNAVAILABLE"


class ConnectError(UnavailableError):
    """Nobody answers at the address, or the connection broke."""

    reason = "CONNECTION_LOST"


class DrainingError(UnavailableError):
    """The process is about to stop and takes no new work."""

    reason = "DRAINING"


class NoWorkerError(UnavailableError):
    """No worker is connected that could serve this."""

    reason = "NO_WORKER"


class EngineLostError(UnavailableError):
    """The worker's engine ended while it had this request."""

    reason = "ENGINE_LOST"


class GenerationCancelledError(DjinnError):
    """The generation was cancelled by somebody else, or its session was closed."""

    reason = "CANCELLED"


class DeadlineExceededError(DjinnError):
    """Not done within the time given."""

    reason = "DEADLINE_EXCEEDED"


class InternalError(DjinnError):
    """A bug of Djinn's."""


_BY_REASON: Final[Mapping[str, type[DjinnError]]] = {
    kind.reason: kind
    for kind in (
        InvalidRequestError,
        SessionNotFoundError,
        WorkerNotFoundError,
        SessionExistsError,
        WrongStateError,
        ContextMismatchError,
        SessionBusyError,
        SessionClosedError,
        StaleGenerationError,
        UnsupportedError,
        ContextTooLongError,
        ExhaustedError,
        UnavailableError,
        DrainingError,
        NoWorkerError,
        EngineLostError,
        GenerationCancelledError,
        DeadlineExceededError,
        InternalError,
    )
} | {"COMMAND_TIMEOUT": DeadlineExceededError}

# For reasons newer than this client: the status code is enough to know what to do.
_BY_CODE: Final[dict[grpc.StatusCode, type[DjinnError]]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.NOT_FOUND: SessionNotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: SessionExistsError,
    grpc.StatusCode.FAILED_PRECONDITION: WrongStateError,
    grpc.StatusCode.OUT_OF_RANGE: ContextTooLongError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ExhaustedError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.CANCELLED: GenerationCancelledError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.UNIMPLEMENTED: UnsupportedError,
}

_CODE_BY_NUMBER: Final[dict[int, grpc.StatusCode]] = {
    code.value[0]: code for code in grpc.StatusCode
}


def error_from_status(status: status_pb2.Status) -> DjinnError:
    """Returns the error that a `google.rpc.Status` describes; its code must not be OK."""
    code = _CODE_BY_NUMBER.get(status.code, grpc.StatusCode.UNKNOWN)
    kind = _BY_CODE.get(code, InternalError)
    reason: str | None = None
    metadata: dict[str, str] = {}
    retry_after_s: float | None = None
    for detail in status.details:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo()
            detail.Unpack(info)
            if info.domain == _DOMAIN:
                kind = _BY_REASON.get(info.reason, kind)
                reason = info.reason
                metadata = dict(info.metadata)
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo()
            detail.Unpack(retry)
            retry_after_s = retry.retry_delay.ToTimedelta().total_seconds()
    return kind(status.message, reason=reason, metadata=metadata, retry_after_s=retry_after_s)


def error_from_rpc(error: grpc.aio.AioRpcError, target: str) -> DjinnError:
    """Returns the typed error of a failed call.

    Args:
        error: What the call raised.
        target: host:port that was called, for the message of a broken connection.
    """
    status = _status_of(error)
    if status is not None:
        return error_from_status(status)
    code, text = error.code(), " ".join((error.details() or "").split())
    if _is_broken_connection(code, text):
        return ConnectError(f"no answer from {target}: {text}", metadata={"endpoint": target})
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceededError(f"{target} did not answer in time")
    kind = _BY_CODE.get(code, InternalError)
    return kind(f"{target}: {text or code.name}")


def _is_broken_connection(code: grpc.StatusCode, text: str) -> bool:
    # A killed server shows in several ways, depending on where in the call it was hit. None of
    # them carries details, which Djinn's own answers always do.
    return code in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED} or (
        code in {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}
        and ("RST_STREAM" in text or "Stream removed" in text)
    )


def _status_of(error: grpc.aio.AioRpcError) -> status_pb2.Status | None:
    for key, value in error.trailing_metadata() or ():
        if key == _DETAILS_KEY and isinstance(value, bytes):
            try:
                status = status_pb2.Status.FromString(value)
            except DecodeError:
                return None
            # Guards against an intermediary that replaced the code and left the details.
            return status if status.code == error.code().value[0] else None
    return None
