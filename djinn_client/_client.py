"""The client of one Djinn."""

from __future__ import annotations

import math
from types import TracebackType
from typing import Self

import grpc
from opentelemetry import trace

from djinn.v1 import agent_service_pb2
from djinn_client import _convert, _tracing
from djinn_client._admin import Admin
from djinn_client._core import Core
from djinn_client._errors import (
    ConnectError,
    DeadlineExceededError,
    InvalidRequestError,
    NoWorkerError,
    UnavailableError,
    UnsupportedError,
)
from djinn_client._retry import RetryPolicy
from djinn_client._session import Session
from djinn_client._state import SessionState
from djinn_client._types import ModelInfo, SessionInfo

_PAGE_SIZE = 1000


async def connect(
    endpoint: str = "localhost:5556",
    *,
    tenant: str = "",
    timeout_s: float = 10.0,
    generate_timeout_s: float = 600.0,
    retry: RetryPolicy | None = None,
    tracer_provider: trace.TracerProvider | None = None,
    credentials: grpc.ChannelCredentials | None = None,
) -> Client:
    """Connects to a Djinn scheduler.

    Args:
        endpoint: host:port of the scheduler.
        tenant: Whose sessions are opened; empty: the default tenant's.
        timeout_s: Most seconds for each call that is not a generation.
        generate_timeout_s: Most seconds for a generation, retries included, unless it says else.
        retry: How a lost worker or scheduler is tried again; None: the defaults.
        tracer_provider: Makes the spans; None: OpenTelemetry's global one.
        credentials: For TLS; None: plain text.

    Returns:
        The client, to be closed by ``async with`` or `Client.aclose`.

    Raises:
        ConnectError: No Djinn scheduler answers there within `timeout_s`.
        InvalidRequestError: A time is not above 0.
    """
    for name, value in (("timeout_s", timeout_s), ("generate_timeout_s", generate_timeout_s)):
        if not 0 < value < math.inf:
            raise InvalidRequestError.of_field(name, f"{value}: must be above 0 and finite")
    core = Core(
        endpoint,
        tenant=tenant,
        timeout_s=timeout_s,
        generate_timeout_s=generate_timeout_s,
        retry=retry or RetryPolicy(),
        tracer=_tracing.tracer_of(tracer_provider),
        credentials=credentials,
    )
    try:
        await core.call(
            core.agents.ListSessions, agent_service_pb2.ListSessionsRequest(page_size=1)
        )
    except (UnavailableError, DeadlineExceededError, UnsupportedError) as error:
        await core.aclose()
        raise ConnectError(
            f"no Djinn scheduler at {endpoint}: {error.message}", metadata={"endpoint": endpoint}
        ) from None
    except BaseException:
        await core.aclose()
        raise
    return Client(core)


class Client:
    """A connection to a scheduler and its workers, shared by any number of sessions.

    Made by `connect`. Not for use from several threads or event loops.

    Attributes:
        admin: What operators and verification tools call.
    """

    def __init__(self, core: Core) -> None:
        self._core = core
        self.admin = Admin(core)

    @property
    def endpoint(self) -> str:
        """host:port of the scheduler."""
        return self._core.endpoint

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
        """Returns a session, to be opened by ``async with`` or `Session.open`.

        Args:
            name: A name for people, at most 256 characters.
            session_id: 1 to 128 characters of ``[A-Za-z0-9._:-]``; None: one is made.
            priority: -100 to 100; larger is served earlier when there is not enough for all.
            fork_of: A session whose context, as it is when this one opens, this one starts with.
            model: The model wanted; empty: any worker's.
            expected_prompt_tokens: Tokens the first prompt will have, for placement; 0: unknown.
        """
        return Session(
            SessionState(
                self._core,
                name=name,
                session_id=session_id,
                priority=priority,
                fork_of=None if fork_of is None else fork_of._state,
                model=model,
                expected_prompt_tokens=expected_prompt_tokens,
            )
        )

    async def sessions(self, *, all_tenants: bool = False) -> list[SessionInfo]:
        """Returns the open sessions of the client's tenant, or of all, in order of session id.

        Raises:
            DjinnError: The call failed.
        """
        found: list[SessionInfo] = []
        request = agent_service_pb2.ListSessionsRequest(
            page_size=_PAGE_SIZE, tenant_id=None if all_tenants else self._core.tenant
        )
        while True:
            page = await self._core.read(self._core.agents.ListSessions, request)
            found.extend(_convert.session_from_proto(session) for session in page.sessions)
            if not page.next_page_token:
                return found
            request.page_token = page.next_page_token

    async def get_session(self, session_id: str) -> SessionInfo:
        """Returns one session as the scheduler knows it.

        Raises:
            SessionNotFoundError: There is none of this id.
            DjinnError: The call failed.
        """
        answer = await self._core.read(
            self._core.agents.GetSession,
            agent_service_pb2.GetSessionRequest(session_id=session_id),
        )
        return _convert.session_from_proto(answer.session)

    async def model(self, endpoint: str | None = None) -> ModelInfo:
        """Returns what a worker serves, as it says itself.

        Args:
            endpoint: host:port of the worker; None: the first connected one.

        Raises:
            NoWorkerError: None is connected.
            DjinnError: The call failed.
        """
        if endpoint is None:
            workers = await self.admin.workers()
            if not workers:
                raise NoWorkerError("no worker is connected")
            endpoint = workers[0].endpoint
        return await self._core.get_model(endpoint)

    async def aclose(self) -> None:
        """Closes the sessions still open and all connections."""
        await self._core.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()
