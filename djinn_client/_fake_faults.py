"""The errors that the servicers behind `djinn_client.testing` answer with."""

from __future__ import annotations

from typing import Any

import grpc
import grpc.aio
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

Context = grpc.aio.ServicerContext[Any, Any]

_CODES = {
    "INVALID_REQUEST": grpc.StatusCode.INVALID_ARGUMENT,
    "SESSION_UNKNOWN": grpc.StatusCode.NOT_FOUND,
    "WORKER_UNKNOWN": grpc.StatusCode.NOT_FOUND,
    "SESSION_EXISTS": grpc.StatusCode.ALREADY_EXISTS,
    "WRONG_STATE": grpc.StatusCode.FAILED_PRECONDITION,
    "CONTEXT_MISMATCH": grpc.StatusCode.FAILED_PRECONDITION,
    "SESSION_BUSY": grpc.StatusCode.FAILED_PRECONDITION,
    "SESSION_CLOSED": grpc.StatusCode.FAILED_PRECONDITION,
    "STALE_GENERATION": grpc.StatusCode.FAILED_PRECONDITION,
    "UNSUPPORTED": grpc.StatusCode.FAILED_PRECONDITION,
    "CONTEXT_TOO_LONG": grpc.StatusCode.OUT_OF_RANGE,
    "EXHAUSTED": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "UNAVAILABLE": grpc.StatusCode.UNAVAILABLE,
    "DRAINING": grpc.StatusCode.UNAVAILABLE,
    "NO_WORKER": grpc.StatusCode.UNAVAILABLE,
    "ENGINE_LOST": grpc.StatusCode.UNAVAILABLE,
    "CANCELLED": grpc.StatusCode.CANCELLED,
    "COMMAND_TIMEOUT": grpc.StatusCode.DEADLINE_EXCEEDED,
    "INTERNAL": grpc.StatusCode.INTERNAL,
}

REASONS = frozenset(_CODES)


class FaultError(Exception):
    """An error that a servicer answers with."""

    def __init__(
        self,
        reason: str,
        message: str,
        metadata: dict[str, str] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.metadata = metadata or {}
        self.retry_after_s = retry_after_s

    def status(self) -> status_pb2.Status:
        """Returns it as the protocol sends it."""
        status = status_pb2.Status(code=_CODES[self.reason].value[0], message=self.message)
        info = error_details_pb2.ErrorInfo(
            reason=self.reason, domain="djinn.v1", metadata=self.metadata
        )
        status.details.add().Pack(info)
        if self.retry_after_s is not None:
            retry = error_details_pb2.RetryInfo()
            retry.retry_delay.FromNanoseconds(int(self.retry_after_s * 1e9))
            status.details.add().Pack(retry)
        return status


async def abort(context: Context, error: FaultError) -> None:
    """Ends a call with an error."""
    await context.abort_with_status(rpc_status.to_status(error.status()))


def traceparent_of(context: Context) -> str:
    """Returns the W3C trace context that a call came with; empty if none did."""
    for key, value in context.invocation_metadata() or ():
        if key == "traceparent":
            return str(value)
    return ""
