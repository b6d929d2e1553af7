from __future__ import annotations

from urllib.parse import quote

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2
from grpc.aio import AioRpcError, Metadata
from grpc_status import rpc_status
from hypothesis import example, given
from hypothesis import strategies as st

from services.common.errors import (
    DjinnError,
    ExhaustedError,
    InternalError,
    InvalidRequestError,
    UnavailableError,
    UnknownSessionError,
    WrongStateError,
)
from services.common.status import error_from_rpc, error_from_status, status_from_error


def test_a_status_has_code_message_and_error_info() -> None:
    status = status_from_error(UnknownSessionError.of("s-1"))

    assert status.code == grpc.StatusCode.NOT_FOUND.value[0]
    assert status.message == "no session 's-1'"
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.reason, info.domain) == ("SESSION_UNKNOWN", "djinn.v1")
    assert dict(info.metadata) == {"session_id": "s-1"}
    assert len(status.details) == 1


@given(seconds=st.floats(min_value=0, max_value=1e6))
def test_when_to_retry_travels_as_retry_info(seconds: float) -> None:
    status = status_from_error(ExhaustedError("full", retry_after_s=seconds))

    retry = error_details_pb2.RetryInfo()
    assert status.details[1].Unpack(retry)
    back = error_from_status(status)
    assert isinstance(back, ExhaustedError)
    assert back.retry_after_s == pytest.approx(seconds, abs=1e-9)


@given(message=st.text(max_size=2000), value=st.text(max_size=1000))
@example(message="ä" * 5000, value="界" * 5000)
@example(message="界" * 5000, value="\n\ud800")
def test_any_message_becomes_one_line_that_fits_the_trailers(message: str, value: str) -> None:
    error = InvalidRequestError(message, metadata={f"field{i}": value for i in range(20)})

    status = status_from_error(error)

    assert len(status.message.splitlines()) <= 1
    # gRPC sends the message percent-encoded and once more in the base64 of the details.
    assert len(quote(status.message)) + 4 * status.ByteSize() / 3 < 8000
    assert isinstance(error_from_status(status), InvalidRequestError)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidRequestError),
        (grpc.StatusCode.UNAVAILABLE, UnavailableError),
        (grpc.StatusCode.FAILED_PRECONDITION, WrongStateError),
        (grpc.StatusCode.NOT_FOUND, InternalError),
        (grpc.StatusCode.UNIMPLEMENTED, InternalError),
    ],
)
def test_a_status_without_details_becomes_the_class_of_its_code(
    code: grpc.StatusCode, kind: type[DjinnError]
) -> None:
    error = error_from_status(status_pb2.Status(code=code.value[0], message="hm"))

    assert type(error) is kind
    assert "hm" in error.message


def test_details_of_another_domain_are_not_taken_for_ours() -> None:
    packed = AnyMessage()
    packed.Pack(error_details_pb2.ErrorInfo(reason="SESSION_UNKNOWN", domain="example.com"))
    status = status_pb2.Status(code=grpc.StatusCode.UNAVAILABLE.value[0], details=[packed])

    assert type(error_from_status(status)) is UnavailableError


def _aio_error(status: status_pb2.Status, *, message: str | None = None) -> AioRpcError:
    converted = rpc_status.to_status(status)
    return AioRpcError(
        converted.code,
        trailing_metadata=Metadata(*converted.trailing_metadata),
        details=converted.details if message is None else message,
    )


def test_a_failed_call_gives_back_the_error_of_the_service() -> None:
    error = error_from_rpc(_aio_error(status_from_error(UnknownSessionError.of("s-1"))))

    assert isinstance(error, UnknownSessionError)
    assert error.metadata == {"session_id": "s-1"}


def test_a_failure_of_the_network_is_not_one_of_the_service() -> None:
    assert error_from_rpc(AioRpcError(grpc.StatusCode.UNAVAILABLE, details="refused")) is None
    assert error_from_rpc(grpc.RpcError()) is None


def test_details_that_contradict_the_call_are_not_believed() -> None:
    status = status_from_error(UnknownSessionError.of("s-1"))

    assert error_from_rpc(_aio_error(status, message="something else")) is None
