from __future__ import annotations

import re

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2, status_pb2

import djinn_client as djinn
from djinn_client import _errors
from services.common import errors as server_errors


def _status(
    code: grpc.StatusCode,
    reason: str,
    metadata: dict[str, str] | None = None,
    retry_after_s: float | None = None,
    domain: str = "djinn.v1",
) -> status_pb2.Status:
    status = status_pb2.Status(code=code.value[0], message="what went wrong")
    status.details.add().Pack(
        error_details_pb2.ErrorInfo(reason=reason, domain=domain, metadata=metadata or {})
    )
    if retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(retry_after_s * 1e9))
        status.details.add().Pack(retry)
    return status


def _rpc_error(
    code: grpc.StatusCode, details: str, status: status_pb2.Status | bytes | None = None
) -> grpc.aio.AioRpcError:
    trailing = grpc.aio.Metadata()
    if status is not None:
        raw = status if isinstance(status, bytes) else status.SerializeToString()
        trailing.add("grpc-status-details-bin", raw)
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, details)


def _server_kinds() -> list[type[server_errors.DjinnError]]:
    found, todo = [], [server_errors.DjinnError]
    while todo:
        kind = todo.pop()
        found.append(kind)
        todo.extend(kind.__subclasses__())
    return found


@pytest.mark.parametrize("kind", _server_kinds(), ids=lambda kind: kind.reason)
def test_every_reason_of_the_servers_has_a_class_of_its_own_here(
    kind: type[server_errors.DjinnError],
) -> None:
    error = _errors.error_from_status(_status(grpc.StatusCode[kind.code], kind.reason))
    assert error.reason == kind.reason
    assert _errors._BY_REASON[kind.reason] is type(error)


def test_the_families_of_the_servers_are_families_here() -> None:
    for kind in _server_kinds():
        mine = _errors._BY_REASON[kind.reason]
        for ancestor in kind.__mro__[1:]:
            if ancestor in (server_errors.DjinnError, Exception):
                break
            assert issubclass(mine, _errors._BY_REASON[ancestor.reason])  # type: ignore[attr-defined]


def test_details_reach_the_error() -> None:
    error = _errors.error_from_status(
        _status(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST", {"field": "max_tokens"})
    )
    assert isinstance(error, djinn.InvalidRequestError)
    assert (error.field, error.message, str(error)) == (
        "max_tokens",
        "what went wrong",
        "what went wrong",
    )
    error = _errors.error_from_status(
        _status(grpc.StatusCode.OUT_OF_RANGE, "CONTEXT_TOO_LONG", {"limit": "2048"})
    )
    assert isinstance(error, djinn.ContextTooLongError)
    assert error.limit == 2048
    error = _errors.error_from_status(
        _status(grpc.StatusCode.RESOURCE_EXHAUSTED, "EXHAUSTED", retry_after_s=1.5)
    )
    assert isinstance(error, djinn.ExhaustedError)
    assert error.retry_after_s == 1.5


def test_a_limit_that_was_not_sent_is_none() -> None:
    assert djinn.ContextTooLongError("too long").limit is None
    assert djinn.ContextTooLongError("too long", metadata={"limit": "much"}).limit is None


def test_a_reason_newer_than_the_client_falls_back_to_the_status_code() -> None:
    error = _errors.error_from_status(_status(grpc.StatusCode.FAILED_PRECONDITION, "NEW_ONE"))
    assert type(error) is djinn.WrongStateError
    assert error.reason == "NEW_ONE"


def test_a_reason_of_another_domain_is_not_ours() -> None:
    error = _errors.error_from_status(
        _status(grpc.StatusCode.NOT_FOUND, "SESSION_BUSY", domain="example.com")
    )
    assert type(error) is djinn.SessionNotFoundError


@pytest.mark.parametrize(
    ("code", "details"),
    [
        (grpc.StatusCode.UNAVAILABLE, "failed to connect to all addresses;\n connection refused"),
        (grpc.StatusCode.CANCELLED, "Cancelling all calls"),
        (grpc.StatusCode.INTERNAL, "Received RST_STREAM with error code 2"),
        (grpc.StatusCode.UNKNOWN, "Stream removed"),
    ],
)
def test_a_broken_connection_names_the_address_on_one_line(
    code: grpc.StatusCode, details: str
) -> None:
    error = _errors.error_from_rpc(_rpc_error(code, details), "gpu-1:5557")
    assert isinstance(error, djinn.ConnectError)
    assert "gpu-1:5557" in error.message
    assert "\n" not in error.message


def test_an_answer_with_details_is_no_broken_connection() -> None:
    status = _status(grpc.StatusCode.CANCELLED, "CANCELLED")
    error = _errors.error_from_rpc(_rpc_error(grpc.StatusCode.CANCELLED, "x", status), "a:1")
    assert type(error) is djinn.GenerationCancelledError


@pytest.mark.parametrize("raw", [b"\xff\xff\xff", status_pb2.Status(code=5).SerializeToString()])
def test_details_that_do_not_fit_the_code_are_not_believed(raw: bytes) -> None:
    error = _errors.error_from_rpc(_rpc_error(grpc.StatusCode.UNAVAILABLE, "bad", raw), "a:1")
    assert isinstance(error, djinn.ConnectError)


def test_codes_without_details() -> None:
    late = _errors.error_from_rpc(_rpc_error(grpc.StatusCode.DEADLINE_EXCEEDED, "late"), "a:1")
    assert isinstance(late, djinn.DeadlineExceededError)
    odd = _errors.error_from_rpc(_rpc_error(grpc.StatusCode.DATA_LOSS, "odd"), "a:1")
    assert isinstance(odd, djinn.InternalError)


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    drawn = []
    for line in (_errors.__doc__ or "").splitlines():
        name = next(iter(re.sub("[│├└─]", " ", line).split()), "")
        if name.endswith("Error") and ("─" in line or name == "DjinnError"):
            drawn.append((name, line.index(name)))
    names = {name for name, _ in drawn}
    public = {name for name in djinn.__all__ if name.endswith("Error")}
    assert names == public
    path: list[tuple[str, int]] = []
    for name, column in drawn:
        while path and path[-1][1] >= column:
            path.pop()
        if path:
            assert getattr(djinn, name).__bases__ == (getattr(djinn, path[-1][0]),)
        path.append((name, column))
