"""Every error of the tree, as a client of any language sees it."""

from __future__ import annotations

import re

import grpc
import pytest
from google.rpc import error_details_pb2

from services.common.errors import DOMAIN, DjinnError
from services.common.status import error_from_status, status_from_error


def _all(root: type[DjinnError]) -> list[type[DjinnError]]:
    return [root, *(kind for child in root.__subclasses__() for kind in _all(child))]


KINDS = _all(DjinnError)


@pytest.mark.parametrize("kind", KINDS)
def test_its_code_is_a_grpc_code_that_is_an_error(kind: type[DjinnError]) -> None:
    code = grpc.StatusCode[kind.code]

    assert code is not grpc.StatusCode.OK
    assert status_from_error(kind("m")).code == code.value[0]


@pytest.mark.parametrize("kind", KINDS)
def test_its_reason_is_an_upper_case_name_of_our_domain(kind: type[DjinnError]) -> None:
    info = error_details_pb2.ErrorInfo()
    assert status_from_error(kind("m")).details[0].Unpack(info)

    assert info.domain == DOMAIN
    # What google.rpc.ErrorInfo demands of a reason.
    assert re.fullmatch(r"[A-Z][A-Z0-9_]+[A-Z0-9]", info.reason)
    assert len(info.reason) <= 63


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not DjinnError])
def test_it_crosses_the_wire_as_itself(kind: type[DjinnError]) -> None:
    sent = kind("what went wrong", metadata={"limit": "7"}, retry_after_s=1.5)

    received = error_from_status(status_from_error(sent))

    assert received.reason == kind.reason
    assert isinstance(received, kind) or kind.reason == "INTERNAL"
    assert received.to_info() == sent.to_info()


def test_each_reason_belongs_to_one_error() -> None:
    reasons = [kind.reason for kind in KINDS if kind is not DjinnError]

    assert len(reasons) == len(set(reasons))
