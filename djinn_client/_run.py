"""A generation under way: its call, clocks and spans."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import grpc
import grpc.aio

from djinn.v1 import inference_service_pb2
from djinn_client import _tracing
from djinn_client._errors import ConnectError, DjinnError, NoWorkerError
from djinn_client._options import span_attributes_of
from djinn_client._retry import Backoff, Deadline
from djinn_client._types import GenerateResult

if TYPE_CHECKING:
    from djinn_client._state import SessionState

_log = logging.getLogger("djinn_client")

_Call = grpc.aio.UnaryStreamCall[
    inference_service_pb2.GenerateRequest, inference_service_pb2.GenerateResponse
]


class Run:
    """What a generation has from its first attempt to its end.

    Args:
        session: Whose generation it is.
        request: For the span's attributes.
        timeout_s: For all attempts together.
    """

    def __init__(
        self,
        session: SessionState,
        request: inference_service_pb2.GenerateRequest,
        timeout_s: float,
    ) -> None:
        core = session.core
        self._session = session
        self._core = core
        self.deadline = Deadline(timeout_s, f"generation of session {session.session_id}")
        self.backoff = Backoff(core.retry, self.deadline)
        self.call: _Call | None = None
        self.resumptions = 0
        self._is_lost = False
        self.started_at = time.perf_counter()
        self.first_token_at: float | None = None
        self.wake_latency_s: float | None = None
        self._wake = session.take_wake()
        parent = self._wake.span if self._wake is not None else None
        self.span = core.tracer.start_span(
            "generate",
            context=_tracing.child_context(parent),
            attributes=span_attributes_of(request),
        )

    def send(self, request: inference_service_pb2.GenerateRequest) -> None:
        """Starts a call.

        Raises:
            DeadlineExceededError: There is no time left for it.
            NoWorkerError: It is not known where to.
        """
        if not self._session.worker_endpoint:
            raise NoWorkerError(f"session {self._session.session_id} has no worker yet")
        request.session_token = self._session.token
        self.call = self._core.worker(self._session.worker_endpoint).Generate(
            request,
            timeout=self.deadline.remaining_s(),
            metadata=tuple(_tracing.headers_of(self.span).items()),
        )

    async def read(self) -> inference_service_pb2.GenerateResponse:
        """Returns the call's next message.

        Raises:
            grpc.aio.AioRpcError: The call failed.
            ConnectError: It ended without an end of the generation.
        """
        assert self.call is not None
        message = await self.call.read()
        if isinstance(message, inference_service_pb2.GenerateResponse):
            return message
        raise ConnectError(f"{self._session.worker_endpoint} ended the answer too early")

    def end_call(self) -> bool:
        """Cancels the call; returns whether one was running."""
        call, self.call = self.call, None
        return call is not None and call.cancel()

    def on_token(self) -> None:
        """Stops the clocks that run to the first token."""
        if self.first_token_at is not None:
            return
        self.first_token_at = time.perf_counter()
        self.span.add_event("first_token")
        if self._wake is not None:
            self.wake_latency_s = self.first_token_at - self._wake.sent_at
            self._session.last_wake_latency_s = self.wake_latency_s
            self._wake.span.set_attribute("djinn.wake.latency", self.wake_latency_s)
            self._end_wake()

    def on_progress(self) -> None:
        """Takes note that the worker is there."""
        self._is_lost = False
        self.backoff.progress()

    def on_resumption(self, error: DjinnError) -> None:
        """Takes note of another attempt; those until the next progress count as one resumption."""
        if self._is_lost:
            return
        self._is_lost = True
        self.resumptions += 1
        self.span.add_event("resume", {"error.type": error.reason})
        _log.info("session %s: sent again after: %s", self._session.session_id, error.message)

    def finish(self, result: GenerateResult) -> None:
        """Ends the spans of a generation that ended well."""
        self.span.set_attributes(
            {
                "gen_ai.response.finish_reasons": [result.finish_reason.value],
                "gen_ai.usage.input_tokens": result.usage.prompt_tokens,
                "gen_ai.usage.output_tokens": result.usage.completion_tokens,
                "djinn.usage.cached_tokens": result.usage.cached_tokens,
                "djinn.usage.prefilled_tokens": result.usage.prefilled_tokens,
            }
        )
        self.span.end()
        self._end_wake()

    def fail(self, error: DjinnError) -> None:
        """Ends the spans of a generation that failed."""
        _tracing.fail(self.span, error)
        self.span.end()
        self._end_wake()

    def abandon(self) -> None:
        """Ends the spans of a generation that was cancelled."""
        self.span.set_attribute("djinn.cancelled", True)
        self.span.end()
        self._end_wake()

    def _end_wake(self) -> None:
        if self._wake is not None:
            self._wake.span.end()
            self._wake = None
