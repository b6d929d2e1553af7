"""One generation: streamed, cancellable, and resumed when its worker is lost."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator
from types import TracebackType
from typing import TYPE_CHECKING, Self

import grpc
import grpc.aio

from djinn.v1 import inference_service_pb2
from djinn_client._errors import (
    ContextMismatchError,
    DeadlineExceededError,
    DjinnError,
    GenerationCancelledError,
    InvalidRequestError,
    SessionBusyError,
    SessionNotFoundError,
    UnavailableError,
    error_from_rpc,
)
from djinn_client._options import request_of
from djinn_client._run import Run
from djinn_client._transcript import DivergedError, Transcript
from djinn_client._types import FinishReason, GenerateOptions, GenerateResult, Piece, Prompt

if TYPE_CHECKING:
    from djinn_client._state import SessionState

_log = logging.getLogger("djinn_client")


class Generation(AsyncIterator[Piece]):
    """The pieces of one generation, as they come.

    Nothing is sent before the first piece is asked for. Leaving the loop early, `aclose` or
    cancelling the task cancels the call, and the session stays usable. A worker that is lost in
    the middle costs time and nothing else.

    ::

        generation = agent.generate("Plan the search.", max_tokens=50)
        async for piece in generation:
            print(piece.text, end="")
        result = await generation.result()
    """

    def __init__(
        self, session: SessionState, prompt: Prompt | None, options: GenerateOptions
    ) -> None:
        self._session = session
        self._core = session.core
        self._request = request_of(session.session_id, prompt, options)
        self._transcript = Transcript(self._request, options.get("full_context"), session.log)
        timeout_s = options.get("timeout_s")
        self._timeout_s = self._core.generate_timeout_s if timeout_s is None else timeout_s
        if not 0 < self._timeout_s < math.inf:
            problem = f"{self._timeout_s}: must be above 0 and finite"
            raise InvalidRequestError.of_field("timeout_s", problem)
        self._run: Run | None = None
        self._error: DjinnError | None = None
        self._result: GenerateResult | None = None
        self._closed = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Piece:
        """Returns the next piece.

        Raises:
            StopAsyncIteration: The generation has ended well, or `aclose` was called.
            DjinnError: It failed.
        """
        if self._error is not None:
            raise self._error
        if self._result is not None or self._closed:
            raise StopAsyncIteration
        try:
            if self._run is None:
                self._run = self._begin()
            piece = await self._next_piece(self._run)
        except DjinnError as error:
            self._fail(error)
            raise
        except asyncio.CancelledError:
            closed_elsewhere = self._is_closed()
            self._abandon()
            task = asyncio.current_task()
            if closed_elsewhere and task is not None and not task.cancelling():
                raise StopAsyncIteration from None
            raise
        if piece is None:
            raise StopAsyncIteration
        return piece

    async def result(self) -> GenerateResult:
        """Returns the outcome, receiving first what has not been asked for yet.

        Raises:
            DjinnError: The generation failed.
            GenerationCancelledError: It was closed before its end.
        """
        async for _ in self:
            pass
        if self._result is None:
            raise GenerationCancelledError("the generation was closed before its end")
        return self._result

    async def aclose(self) -> None:
        """Cancels the call, if it is running. Idempotent."""
        self._abandon()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        # A loop left early drops its iterator: the session must be free for the next generation
        # at once, not when a collector gets to it.
        if getattr(self, "_run", None) is not None:
            # The loop may be gone; then so is the call.
            with contextlib.suppress(RuntimeError):
                self._abandon()

    @property
    def active(self) -> bool:
        """True from the first piece asked for until its end."""
        ended = self._result is not None or self._error is not None or self._closed
        return self._run is not None and not ended

    def _abandon(self) -> None:
        """Cancels the call, if it is running; `aclose` for code that cannot await."""
        was_active = self.active
        self._closed = True
        if was_active and self._run is not None:
            self._session.was_cut = True
            self._run.end_call()
            self._run.abandon()

    def _is_closed(self) -> bool:
        return self._closed

    # --- the stream ------------------------------------------------------------------------------

    def _begin(self) -> Run:
        self._session.begin(self)
        return Run(self._session, self._request, self._timeout_s)

    async def _next_piece(self, run: Run) -> Piece | None:
        while not self._closed:
            message = await self._receive(run)
            if isinstance(message, DjinnError):
                await self._recover(run, message)
            else:
                piece = self._take(run, message)
                if piece is not None:
                    return piece
            if self._transcript.finish_reason is not None:
                self._finish(run, self._transcript.finish_reason)
                return None
        return None

    async def _receive(self, run: Run) -> inference_service_pb2.GenerateResponse | DjinnError:
        """Returns the next message, or why there is none.

        Errors are returned and handled outside of ``except``, without their tracebacks: one kept
        in a frame it has passed would keep this object alive after its loop was left.
        """
        try:
            if run.call is None:
                run.send(self._transcript.next_request())
            return await run.read()
        except grpc.aio.AioRpcError as failure:
            return error_from_rpc(failure, self._session.worker_endpoint)
        except UnavailableError as error:
            return error.with_traceback(None)

    def _take(self, run: Run, message: inference_service_pb2.GenerateResponse) -> Piece | None:
        run.on_progress()
        kind = message.WhichOneof("event")
        if kind == "started":
            self._transcript.on_started(message.started)
        elif kind == "delta":
            if message.delta.token_ids:
                run.on_token()
            try:
                return self._transcript.on_delta(message.delta)
            except DivergedError:
                _log.warning(
                    "session %s: the new worker repeats other tokens; it goes on after the last",
                    self._session.session_id,
                )
                self._transcript.fold_all()
                self._session.was_cut = True
                run.end_call()
        elif kind == "finished":
            self._transcript.on_finished(message.finished)
        return None

    async def _recover(self, run: Run, error: DjinnError) -> None:
        """Prepares another attempt, or raises `error` if none can help."""
        session = self._session
        run.end_call()
        if isinstance(error, UnavailableError | DeadlineExceededError):
            session.was_cut = True
        if isinstance(error, ContextMismatchError | SessionNotFoundError):
            if self._transcript.sends_full_context:
                raise error
        elif isinstance(error, SessionBusyError) and session.was_cut:
            # The worker has not noticed yet that the last call was cut.
            await run.backoff.pause(error)
        elif isinstance(error, UnavailableError):
            await self._wait_for_worker(run, error)
        elif isinstance(error, DeadlineExceededError):
            raise run.deadline.error()
        else:
            raise error
        run.on_resumption(error)

    async def _wait_for_worker(self, run: Run, error: DjinnError) -> None:
        while True:
            await run.backoff.pause(error)
            await self._core.relearn_endpoint(self._session, run.deadline)
            if self._closed or not self._transcript.token_ids:
                return
            try:
                eos: frozenset[int] = frozenset()
                if not self._request.ignore_eos:
                    eos = await self._core.eos_token_ids(self._session, run.deadline)
            except UnavailableError as again:
                error = again.with_traceback(None)
            else:
                self._transcript.end_if_complete(eos)
                return

    # --- the end ---------------------------------------------------------------------------------

    def _finish(self, run: Run, reason: FinishReason) -> None:
        told, now = self._transcript, time.perf_counter()
        self._result = GenerateResult(
            text=told.text,
            token_ids=tuple(told.token_ids),
            finish_reason=reason,
            stop_string=told.stop_string,
            usage=told.usage,
            kv=told.kv,
            queue_s=told.queue_s,
            first_token_s=(run.first_token_at or now) - run.started_at,
            duration_s=now - run.started_at,
            wake_latency_s=run.wake_latency_s,
            resumptions=run.resumptions,
            logprobs=tuple(told.logprobs),
        )
        self._session.on_result(self._result)
        run.finish(self._result)

    def _fail(self, error: DjinnError) -> None:
        self._error = error
        if self._run is not None:
            if self._run.end_call():
                self._session.was_cut = True
            self._run.fail(error)
