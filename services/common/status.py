"""Errors on the wire: `DjinnError` to and from `google.rpc.Status` and gRPC calls."""

from __future__ import annotations

from typing import cast

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from services.common.errors import (
    DOMAIN,
    CancelledError,
    CommandTimeoutError,
    ContextTooLongError,
    DjinnError,
    ErrorInfo,
    ExhaustedError,
    InternalError,
    InvalidRequestError,
    UnavailableError,
    WrongStateError,
    from_info,
)

# Clients accept 8 KiB of trailers by default. The message is in them twice, once percent-encoded
# (up to three times as long) and once in the details' base64, and beside it the metadata.
_MAX_MESSAGE_BYTES = 800
_MAX_METADATA_ENTRIES = 8
_MAX_KEY_BYTES = 64
_MAX_VALUE_BYTES = 256

_CUT = "…".encode()

# What a status without our details means. NOT_FOUND and ALREADY_EXISTS do not say of what.
_BY_CODE: dict[grpc.StatusCode, type[DjinnError]] = {
    grpc.StatusCode.CANCELLED: CancelledError,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.DEADLINE_EXCEEDED: CommandTimeoutError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ExhaustedError,
    grpc.StatusCode.FAILED_PRECONDITION: WrongStateError,
    grpc.StatusCode.OUT_OF_RANGE: ContextTooLongError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
}
_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


def _line(text: str, limit: int) -> str:
    """Returns a text on one line, cut to so many bytes of UTF-8."""
    # A lone surrogate cannot be sent.
    line = " ".join(text.split()).encode("utf-8", "replace")
    if len(line) <= limit:
        return line.decode("utf-8")
    return line[: limit - len(_CUT)].decode("utf-8", "ignore") + _CUT.decode("utf-8")


def _pack(message: error_details_pb2.ErrorInfo | error_details_pb2.RetryInfo) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(message)
    return packed


def status_from_error(error: DjinnError) -> status_pb2.Status:
    """Returns the error as a status with an `ErrorInfo`, and a `RetryInfo` if it can be retried.

    The message becomes one line; what is too long for a response's trailers is cut.
    """
    info = error.to_info()
    metadata = {
        _line(key, _MAX_KEY_BYTES): _line(value, _MAX_VALUE_BYTES)
        for key, value in list(info.metadata.items())[:_MAX_METADATA_ENTRIES]
    }
    details = [
        _pack(error_details_pb2.ErrorInfo(reason=info.reason, domain=DOMAIN, metadata=metadata))
    ]
    if info.retry_after_s is not None:
        delay = Duration()
        delay.FromNanoseconds(max(0, round(info.retry_after_s * 1e9)))
        details.append(_pack(error_details_pb2.RetryInfo(retry_delay=delay)))
    code: int = grpc.StatusCode[info.code].value[0]
    return status_pb2.Status(
        code=code, message=_line(info.message, _MAX_MESSAGE_BYTES), details=details
    )


def error_from_status(status: status_pb2.Status) -> DjinnError:
    """Returns the error that a status describes.

    A status without our details, as gRPC itself makes them, becomes the class of its code.

    Args:
        status: Any status but OK.
    """
    info: error_details_pb2.ErrorInfo | None = None
    retry_after_s: float | None = None
    for detail in status.details:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            candidate = error_details_pb2.ErrorInfo()
            detail.Unpack(candidate)
            if candidate.domain == DOMAIN:
                info = candidate
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo()
            detail.Unpack(retry)
            retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
    code = _CODES.get(status.code, grpc.StatusCode.UNKNOWN)
    if info is not None:
        return from_info(
            ErrorInfo(code.name, info.reason, status.message, dict(info.metadata), retry_after_s)
        )
    kind = _BY_CODE.get(code)
    if kind is None:
        return InternalError(f"{code.name}: {status.message}", retry_after_s=retry_after_s)
    return kind(status.message, retry_after_s=retry_after_s)


def error_from_rpc(error: grpc.RpcError) -> DjinnError | None:
    """Returns the error a Djinn service ended a call with; None if the failure is not one's own.

    None stands for what the network or gRPC itself reports: no connection, a deadline, a method
    that does not exist.

    Args:
        error: What a call raised; `grpc.aio.AioRpcError` or its synchronous twin.
    """
    if not isinstance(error, grpc.Call | grpc.aio.AioRpcError):
        return None
    try:
        # All it needs are code, details and trailers, which the asynchronous error has too.
        status: status_pb2.Status | None = rpc_status.from_call(cast("grpc.Call", error))
    except ValueError:
        # Details that contradict the call's own code or message are a proxy's, not ours.
        return None
    if status is None or not any(
        detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR) for detail in status.details
    ):
        return None
    return error_from_status(status)
