from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from opentelemetry import trace

from djinn.v1 import agent_service_pb2 as pb
from djinn_client import Phase, RetryPolicy
from djinn_client._signals import PhaseSender, Signal


class Stub:
    """A scheduler that takes single calls; the first stream meets a bug of the client's."""

    def __init__(self) -> None:
        self.said: list[tuple[str, int]] = []

    def StreamPhases(self) -> Any:
        raise OverflowError("a bug")

    async def SignalPhase(self, request: pb.SignalPhaseRequest, **_: object) -> Any:
        self.said.append((request.session_id, request.sequence))
        return pb.SignalPhaseResponse()


def signal(session_id: str) -> Signal:
    request = pb.SignalPhaseRequest(session_id=session_id, sequence=1)
    return Signal(request, Phase.IO_WAIT, trace.INVALID_SPAN)


async def test_signals_go_on_after_a_bug_has_ended_their_sending(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stub = Stub()
    sender = PhaseSender(
        stub,  # type: ignore[arg-type]
        "target",
        RetryPolicy(),
        answer_timeout_s=5,
        on_answer=lambda session_id, answer: None,
    )
    first, second = signal("a"), signal("b")
    sender.post(first)
    task = sender._task
    assert task is not None
    await asyncio.wait([task])
    await asyncio.sleep(0)  # the callbacks of its end
    [record] = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert record.exc_info

    sender._unary = True
    sender.post(second)
    await first.answered.wait()
    await second.answered.wait()

    assert set(stub.said) == {("a", 1), ("b", 1)}
    await sender.aclose()
