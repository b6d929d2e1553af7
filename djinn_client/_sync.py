"""The client for code without an event loop: the same names, blocking.

One thread per client runs the loop of the asynchronous client, so signals are repeated and
streams kept while the caller computes. A generation is an ordinary iterator.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Self, Unpack

import grpc
from opentelemetry import trace

from djinn_client import _client, _generation, _session
from djinn_client._errors import SessionClosedError
from djinn_client._portal import Portal
from djinn_client._retry import RetryPolicy
from djinn_client._types import (
    CommandOutcome,
    EvictMode,
    GenerateOptions,
    GenerateResult,
    ModelInfo,
    Phase,
    Piece,
    Prompt,
    SessionInfo,
    Stats,
    Turn,
    WorkerInfo,
)

_current: ContextVar[Session | None] = ContextVar("djinn_client_sync_session", default=None)


def connect(
    endpoint: str = "localhost:5556",
    *,
    tenant: str = "",
    timeout_s: float = 10.0,
    generate_timeout_s: float = 600.0,
    retry: RetryPolicy | None = None,
    tracer_provider: trace.TracerProvider | None = None,
    credentials: grpc.ChannelCredentials | None = None,
) -> Client:
    """Connects to a Djinn scheduler; as `djinn_client.connect`.

    Raises:
        ConnectError: No Djinn scheduler answers there within `timeout_s`.
        InvalidRequestError: A time is not above 0.
    """
    portal = Portal()
    try:
        client = portal.call(
            _client.connect(
                endpoint,
                tenant=tenant,
                timeout_s=timeout_s,
                generate_timeout_s=generate_timeout_s,
                retry=retry,
                tracer_provider=tracer_provider,
                credentials=credentials,
            )
        )
    except BaseException:
        portal.close()
        raise
    return Client(client, portal)


class Client:
    """A connection to a scheduler and its workers; as `djinn_client.Client`.

    Several threads may use one client, each with sessions of its own.

    Attributes:
        admin: What operators and verification tools call.
    """

    def __init__(self, client: _client.Client, portal: Portal) -> None:
        self._client = client
        self._portal = portal
        self._closed = False
        self.admin = Admin(client, portal)

    @property
    def endpoint(self) -> str:
        """host:port of the scheduler."""
        return self._client.endpoint

    def session(
        self,
        name: str = "",
        *,
        session_id: str | None = None,
        priority: int = 0,
        fork_of: Session | None = None,
        model: str = "",
        expected_prompt_tokens: int = 0,
    ) -> Session:
        """Returns a session, to be opened by ``with`` or `Session.open`."""
        inner = self._client.session(
            name,
            session_id=session_id,
            priority=priority,
            fork_of=None if fork_of is None else fork_of._inner,
            model=model,
            expected_prompt_tokens=expected_prompt_tokens,
        )
        return Session(inner, self._portal)

    def sessions(self, *, all_tenants: bool = False) -> list[SessionInfo]:
        """Returns the open sessions of the client's tenant, or of all."""
        return self._portal.call(self._client.sessions(all_tenants=all_tenants))

    def get_session(self, session_id: str) -> SessionInfo:
        """Returns one session as the scheduler knows it."""
        return self._portal.call(self._client.get_session(session_id))

    def model(self, endpoint: str | None = None) -> ModelInfo:
        """Returns what a worker serves, as it says itself."""
        return self._portal.call(self._client.model(endpoint))

    def close(self) -> None:
        """Closes the sessions still open, all connections and the client's thread. Idempotent."""
        if self._closed:
            return
        self._closed = True
        try:
            self._portal.call(self._client.aclose())
        finally:
            self._portal.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class Session:
    """An agent's context on a worker, and the phase the agent is in; as `djinn_client.Session`."""

    def __init__(self, inner: _session.Session, portal: Portal) -> None:
        self._inner = inner
        self._portal = portal
        self._context_token: Token[Session | None] | None = None

    @property
    def session_id(self) -> str:
        """Unique among all sessions."""
        return self._inner.session_id

    @property
    def name(self) -> str:
        """The name for people."""
        return self._inner.name

    @property
    def phase(self) -> Phase:
        """The phase last signalled."""
        return self._inner.phase

    @property
    def context(self) -> tuple[int, ...]:
        """All token ids of the session so far, as far as they have been received."""
        return self._inner.context

    @property
    def context_length(self) -> int:
        """How many token ids that is."""
        return self._inner.context_length

    @property
    def worker_endpoint(self) -> str:
        """host:port of the worker that the next generation is sent to."""
        return self._inner.worker_endpoint

    @property
    def last_wake_latency_s(self) -> float | None:
        """Seconds from the last wake's COMPUTE to its first token; None before the first."""
        return self._inner.last_wake_latency_s

    @property
    def last_result(self) -> GenerateResult | None:
        """The outcome of the last generation that ended well."""
        return self._inner.last_result

    def open(self) -> None:
        """Opens the session at the scheduler. Idempotent."""
        self._portal.call(self._inner.open())

    def close(self) -> None:
        """Ends the session. Idempotent; closing the client does it too."""
        if not self._portal.closed:
            self._portal.call(self._inner.aclose())

    def __enter__(self) -> Self:
        self.open()
        self._context_token = _current.set(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._context_token is not None:
            # Another thread may leave the block than the one that entered it.
            with contextlib.suppress(ValueError):
                _current.reset(self._context_token)
            self._context_token = None
        self.close()

    def generate(
        self, prompt: Prompt | None = None, **options: Unpack[GenerateOptions]
    ) -> Generation:
        """Appends to the context and generates from it."""
        return Generation(self._inner.generate(prompt, **options), self._portal)

    def generate_text(
        self, prompt: Prompt | None = None, **options: Unpack[GenerateOptions]
    ) -> str:
        """Like `generate`, and returns the whole text."""
        return self._portal.call(self._inner.generate_text(prompt, **options))

    def chat(self, content: str, role: str = "user", **options: Unpack[GenerateOptions]) -> str:
        """Appends one turn by the model's chat template and returns the answer's text."""
        return self.generate_text(Turn(role, content), **options)

    def signal_phase(
        self, phase: Phase | str, *, tool_name: str = "", expected_s: float | None = None
    ) -> None:
        """Tells the scheduler the phase the agent enters; waits for the answer of an IO_WAIT.

        The wait is bounded, and an unreachable scheduler is no error.
        """

        async def signal() -> None:
            await self._inner.signal_phase(phase, tool_name=tool_name, expected_s=expected_s)

        self._portal.call(signal())

    @contextlib.contextmanager
    def tool(self, name: str = "", *, expected_s: float | None = None) -> Iterator[None]:
        """A block that a tool runs in: IO_WAIT on entry, COMPUTE on exit, also on error."""
        self._portal.call_sync(lambda: self._inner._state.enter_tool(name, expected_s))
        try:
            yield
        finally:
            self._portal.call_sync(self._inner._state.leave_tool)


class Generation(Iterator[Piece]):
    """The pieces of one generation, as they come; as `djinn_client.Generation`."""

    def __init__(self, inner: _generation.Generation, portal: Portal) -> None:
        self._inner = inner
        self._portal = portal

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Piece:
        piece = self._portal.call(self._next())
        if piece is None:
            raise StopIteration
        return piece

    async def _next(self) -> Piece | None:
        # StopAsyncIteration cannot cross a future.
        return await anext(self._inner, None)

    def result(self) -> GenerateResult:
        """Returns the outcome, receiving first what has not been asked for yet."""
        return self._portal.call(self._inner.result())

    def close(self) -> None:
        """Cancels the call, if it is running. Idempotent."""
        if not self._portal.closed:
            self._portal.call(self._inner.aclose())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # A loop left early. The call belongs to the other thread, so it is cancelled there.
        inner = getattr(self, "_inner", None)
        if inner is not None and inner.active:
            self._portal.post(inner._abandon)


class Admin:
    """The scheduler's AdminService; as `djinn_client.Admin`."""

    def __init__(self, client: _client.Client, portal: Portal) -> None:
        self._admin = client.admin
        self._portal = portal

    def workers(self) -> list[WorkerInfo]:
        """Returns the connected workers, in order of their ids."""
        return self._portal.call(self._admin.workers())

    def evict(self, session_id: str, mode: EvictMode | str = EvictMode.LAZY) -> CommandOutcome:
        """Evicts a session now and waits until it is done."""
        return self._portal.call(self._admin.evict(session_id, mode))

    def restore(self, session_id: str) -> CommandOutcome:
        """Restores a session now and waits until it is done."""
        return self._portal.call(self._admin.restore(session_id))

    def drop(self, session_id: str) -> CommandOutcome:
        """Forgets a session's KV on both sides."""
        return self._portal.call(self._admin.drop(session_id))

    def drain(self, worker_id: str, *, resume: bool = False) -> WorkerInfo:
        """Stops placing sessions on a worker, or starts again; returns it as it is now."""
        return self._portal.call(self._admin.drain(worker_id, resume=resume))

    def stats(self) -> Stats:
        """Returns what the system has done, all workers together."""
        return self._portal.call(self._admin.stats())


def current_session() -> Session:
    """Returns the innermost session that was entered with ``with`` in this thread.

    Raises:
        SessionClosedError: There is none.
    """
    session = _current.get()
    if session is None:
        raise SessionClosedError("no session is current here: enter one with `with`")
    return session


def signal_phase(
    phase: Phase | str, *, tool_name: str = "", expected_s: float | None = None
) -> None:
    """Tells the scheduler the phase of the current session; see `Session.signal_phase`.

    Raises:
        SessionClosedError: There is no current session.
        InvalidRequestError: `phase` is no phase that can be signalled, or `expected_s` is not
            above 0.
    """
    current_session().signal_phase(phase, tool_name=tool_name, expected_s=expected_s)
