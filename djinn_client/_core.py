"""What a client's sessions share: channels, deadlines, the stream of phases, the tracer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, TypeVar

import grpc
import grpc.aio
from opentelemetry import trace

from djinn.v1 import (
    admin_service_pb2_grpc,
    agent_service_pb2,
    agent_service_pb2_grpc,
    inference_service_pb2,
    inference_service_pb2_grpc,
)
from djinn_client import _convert, _tracing
from djinn_client._channels import Channels
from djinn_client._errors import (
    ConnectError,
    DeadlineExceededError,
    DjinnError,
    UnavailableError,
    error_from_rpc,
)
from djinn_client._retry import Backoff, Deadline, RetryPolicy
from djinn_client._signals import PhaseSender
from djinn_client._types import ModelInfo

if TYPE_CHECKING:
    from djinn_client._state import SessionState

_log = logging.getLogger("djinn_client")

_Request_contra = TypeVar("_Request_contra", contravariant=True)
_Response_co = TypeVar("_Response_co", covariant=True)
_Request = TypeVar("_Request")
_Response = TypeVar("_Response")

# A scheduler that is gone must not hold up a generation for longer than this at a time.
_RELEARN_TIMEOUT_S = 2.0
# After so long without an answer to a signal the stream of phases is made anew.
_ANSWER_TIMEOUT_S = 5.0
# For so long awaiting an IO_WAIT may hold up an agent whose scheduler is gone.
_SIGNAL_PATIENCE_S = 1.0


class _Unary(Protocol[_Request_contra, _Response_co]):
    def __call__(
        self,
        request: _Request_contra,
        /,
        *,
        timeout: float | None = None,
        metadata: tuple[tuple[str, str], ...] | None = None,
    ) -> Awaitable[_Response_co]: ...


class Core:
    """The connection to one scheduler and its workers.

    Args:
        endpoint: host:port of the scheduler.
        tenant: Whose sessions are opened.
        timeout_s: For each call that is not a generation.
        generate_timeout_s: For a generation, retries included.
        retry: How lost workers and schedulers are tried again.
        tracer: Makes the spans.
        credentials: For TLS; None: plain text.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        tenant: str,
        timeout_s: float,
        generate_timeout_s: float,
        retry: RetryPolicy,
        tracer: trace.Tracer,
        credentials: grpc.ChannelCredentials | None,
    ) -> None:
        self.endpoint = endpoint
        self.tenant = tenant
        self.timeout_s = timeout_s
        self.generate_timeout_s = generate_timeout_s
        self.retry = retry
        self.tracer = tracer
        self.channels = Channels(credentials)
        channel = self.channels.get(endpoint)
        self.agents = agent_service_pb2_grpc.AgentServiceStub(channel)
        self.admin = admin_service_pb2_grpc.AdminServiceStub(channel)
        self.sender = PhaseSender(
            self.agents,
            endpoint,
            retry,
            answer_timeout_s=min(timeout_s, _ANSWER_TIMEOUT_S),
            on_answer=self._on_signal_answer,
        )
        self.sessions: dict[str, SessionState] = {}
        self.signal_patience_s = min(timeout_s, _SIGNAL_PATIENCE_S)
        self._workers: dict[str, inference_service_pb2_grpc.InferenceServiceAsyncStub] = {}
        self._epoch = ""
        self._background: set[asyncio.Task[None]] = set()

    def worker(self, endpoint: str) -> inference_service_pb2_grpc.InferenceServiceAsyncStub:
        """Returns the service of the worker at an endpoint."""
        stub = self._workers.get(endpoint)
        if stub is None:
            stub = inference_service_pb2_grpc.InferenceServiceStub(self.channels.get(endpoint))
            self._workers[endpoint] = stub
        self.channels.check_open()
        return stub

    async def call(
        self,
        method: _Unary[_Request, _Response],
        request: _Request,
        *,
        timeout_s: float | None = None,
        target: str | None = None,
    ) -> _Response:
        """Makes one call.

        Args:
            method: A stub's method.
            request: Its request.
            timeout_s: The call's deadline; None: the client's.
            target: host:port for messages; None: the scheduler's.

        Raises:
            DjinnError: It failed.
            RuntimeError: The client is closed.
        """
        self.channels.check_open()
        try:
            return await method(
                request,
                timeout=self.timeout_s if timeout_s is None else timeout_s,
                metadata=tuple(_tracing.headers_of(None).items()),
            )
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error, target or self.endpoint) from None

    async def call_until_available(
        self, method: _Unary[_Request, _Response], request: _Request
    ) -> _Response:
        """Makes a call that may be repeated safely, until its service is there.

        Raises:
            DjinnError: It failed otherwise, or the retry policy gave up.
            RuntimeError: The client is closed.
        """
        return await self._repeat(method, request, self.retry, self.endpoint)

    async def read(
        self,
        method: _Unary[_Request, _Response],
        request: _Request,
        *,
        target: str | None = None,
    ) -> _Response:
        """Makes a call that only asks, again and again for as long as one call may take.

        Raises:
            DjinnError: It failed.
            RuntimeError: The client is closed.
        """
        policy = replace(self.retry, give_up_s=min(self.retry.give_up_s, self.timeout_s))
        return await self._repeat(method, request, policy, target or self.endpoint)

    async def _repeat(
        self,
        method: _Unary[_Request, _Response],
        request: _Request,
        policy: RetryPolicy,
        target: str,
    ) -> _Response:
        backoff = Backoff(policy)
        while True:
            try:
                return await self.call(method, request, target=target)
            except (UnavailableError, DeadlineExceededError) as error:
                await backoff.pause(error)

    async def get_model(self, endpoint: str) -> ModelInfo:
        """Returns what the worker at an endpoint serves."""
        answer = await self.read(
            self.worker(endpoint).GetModel,
            inference_service_pb2.GetModelRequest(),
            target=endpoint,
        )
        return _convert.model_from_proto(answer.model)

    async def eos_token_ids(self, session: SessionState, deadline: Deadline) -> frozenset[int]:
        """Returns the ids that end a session's generations by themselves; asked for until known.

        Raises:
            UnavailableError: The worker did not answer; ask again, for the session may have moved.
            DjinnError: It refused.
        """
        if session.eos_token_ids is None:
            endpoint = session.worker_endpoint
            timeout_s = deadline.remaining_s(min(self.timeout_s, _RELEARN_TIMEOUT_S))
            try:
                answer = await self.call(
                    self.worker(endpoint).GetModel,
                    inference_service_pb2.GetModelRequest(),
                    timeout_s=timeout_s,
                    target=endpoint,
                )
            except DeadlineExceededError as error:
                raise ConnectError(error.message) from None
            session.eos_token_ids = frozenset(answer.model.eos_token_ids)
        return session.eos_token_ids

    async def relearn_endpoint(self, session: SessionState, deadline: Deadline) -> None:
        """Asks the scheduler where a session is now; without an answer it stays where it was."""
        timeout_s = deadline.remaining_s(min(self.timeout_s, _RELEARN_TIMEOUT_S))
        try:
            answer = await self.call(
                self.agents.GetSession,
                agent_service_pb2.GetSessionRequest(session_id=session.session_id),
                timeout_s=timeout_s,
            )
            session.on_endpoint(answer.session.worker_endpoint)
        except DjinnError as error:
            if error.reason != "SESSION_UNKNOWN":
                _log.debug("session %s: %s", session.session_id, error.message)
                return
            await self._reopen(session, timeout_s)

    async def _reopen(self, session: SessionState, timeout_s: float) -> None:
        if not session.is_open:
            return
        try:
            answer = await self.call(
                self.agents.OpenSession,
                session.open_request(),
                timeout_s=timeout_s,
            )
        except DjinnError as error:
            _log.debug("session %s: %s", session.session_id, error.message)
            return
        if self.sessions.get(session.session_id) is not session:
            # It was closed meanwhile, perhaps before this opened it again.
            self.in_background(session.say_closed)
            return
        session.on_opened(answer)
        self.note_epoch(answer.scheduler_epoch)
        self.sender.say_again()

    def note_epoch(self, epoch: str) -> None:
        """Says all phases again if the scheduler that answered is not the one before."""
        if self._epoch and epoch and epoch != self._epoch:
            _log.info("the scheduler at %s is a new process: saying phases again", self.endpoint)
            self.sender.say_again()
        self._epoch = epoch or self._epoch

    def in_background(self, make: Callable[[], Coroutine[None, None, None]]) -> asyncio.Task[None]:
        """Runs something that must go on when its caller is cancelled."""
        task = asyncio.create_task(make())
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    async def aclose(self) -> None:
        """Closes the sessions still open, then the channels."""
        await asyncio.gather(*(session.close() for session in list(self.sessions.values())))
        if self._background:
            _, late = await asyncio.wait(self._background, timeout=self.timeout_s)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late)
        await self.sender.aclose()
        await self.channels.aclose()

    def _on_signal_answer(
        self, session_id: str, answer: agent_service_pb2.SignalPhaseResponse
    ) -> None:
        session = self.sessions.get(session_id)
        if session is not None:
            session.on_endpoint(answer.worker_endpoint)
        self.note_epoch(answer.scheduler_epoch)
