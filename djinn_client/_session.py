"""One agent's session."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
import uuid
import weakref
from contextvars import Token
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self, Unpack

from opentelemetry import trace

from djinn.v1 import agent_service_pb2
from djinn_client import _context, _convert, _tracing
from djinn_client._errors import (
    DjinnError,
    InvalidRequestError,
    SessionBusyError,
    SessionClosedError,
    UnavailableError,
)
from djinn_client._generation import Generation
from djinn_client._signals import PhaseSignal, Signal
from djinn_client._transcript import TokenLog
from djinn_client._types import GenerateOptions, GenerateResult, Phase, Prompt, Turn

if TYPE_CHECKING:
    from djinn_client._core import Core

_log = logging.getLogger("djinn_client")


@dataclass(frozen=True, slots=True)
class Wake:
    """A COMPUTE that was sent and whose generation is still to come."""

    sent_at: float
    span: trace.Span


class Session:
    """An agent's context on a worker, and the phase the agent is in.

    Made by `Client.session`; entered with ``async with``, or with `open` and `aclose`. A session
    runs one generation at a time. Not for use from several threads.
    """

    def __init__(
        self,
        core: Core,
        *,
        name: str,
        session_id: str | None,
        priority: int,
        fork_of: Session | None,
        model: str,
        expected_prompt_tokens: int,
    ) -> None:
        self.core = core
        self.log = TokenLog()
        self.token = b""
        self.was_cut = False
        self.eos_token_ids: frozenset[int] | None = None
        self.last_wake_latency_s: float | None = None
        self.last_result: GenerateResult | None = None
        self._name = name
        self._session_id = session_id or uuid.uuid4().hex
        self._priority = priority
        self._fork_of = fork_of
        self._model = model
        self._expected_prompt_tokens = expected_prompt_tokens
        self._phase = Phase.OPEN
        self._is_open = False
        self._sequence = 0
        self._tools = 0
        self._wake: Wake | None = None
        self._worker_endpoint = ""
        self._running: weakref.ref[Generation] | None = None
        self._context_token: Token[Session | None] | None = None

    # --- what it is ------------------------------------------------------------------------------

    @property
    def session_id(self) -> str:
        """Unique among all sessions."""
        return self._session_id

    @property
    def name(self) -> str:
        """The name for people."""
        return self._name

    @property
    def phase(self) -> Phase:
        """The phase last signalled."""
        return self._phase

    @property
    def context(self) -> tuple[int, ...]:
        """All token ids of the session so far, as far as they have been received."""
        return tuple(self.log.ids)

    @property
    def context_length(self) -> int:
        """How many token ids that is."""
        return len(self.log.ids)

    @property
    def worker_endpoint(self) -> str:
        """host:port of the worker that the next generation is sent to."""
        return self._worker_endpoint

    def __repr__(self) -> str:
        return f"<Session {self._session_id} {self._phase} {len(self.log.ids)} tokens>"

    # --- life ------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Opens the session at the scheduler and learns its worker. Idempotent.

        Raises:
            ExhaustedError: No more sessions are admitted now; `retry_after_s` says when.
            UnavailableError: No scheduler or no worker came within the retry policy's time.
            SessionClosedError: It has been closed.
            DjinnError: It was refused.
        """
        if self._is_open:
            return
        if self._phase is Phase.CLOSED:
            raise self._closed_error()
        request = self.open_request()
        answer = await self.core.call_until_available(self.core.agents.OpenSession, request)
        self._is_open = True
        if self._fork_of is not None:
            self.log.ids[:] = self._fork_of.log.ids
            self.log.is_shared = False
        self.core.sessions[self._session_id] = self
        self.on_opened(answer)
        self.core.note_epoch(answer.scheduler_epoch)
        self.core.sender.start()

    async def aclose(self) -> None:
        """Ends the session: cancels what runs and frees its KV everywhere. Idempotent.

        An unreachable scheduler is no error: it is tried again in the background until the client
        is closed.
        """
        if not self._is_open:
            self._phase = Phase.CLOSED
            return
        self._is_open = False
        self._phase = Phase.CLOSED
        running = self._running() if self._running is not None else None
        if running is not None:
            await running.aclose()
        self._end_wake()
        self.core.sessions.pop(self._session_id, None)
        # A task of its own, so that cancelling the caller does not leave the session open.
        first_try = asyncio.Event()
        closing = self.core.in_background(lambda: self._close(first_try))
        tried = asyncio.create_task(first_try.wait())
        try:
            await asyncio.wait({closing, tried}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            tried.cancel()

    async def _close(self, first_try: asyncio.Event) -> None:
        await self.core.sender.forget(self._session_id, self.core.signal_patience_s)
        request = agent_service_pb2.CloseSessionRequest(session_id=self._session_id)
        try:
            with contextlib.suppress(UnavailableError):
                await self.core.call(self.core.agents.CloseSession, request)
                return
            first_try.set()
            await self.core.call_until_available(self.core.agents.CloseSession, request)
        except DjinnError as error:
            _log.warning("session %s was not closed: %s", self._session_id, error.message)

    async def __aenter__(self) -> Self:
        await self.open()
        self._context_token = _context.current.set(self)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._context_token is not None:
            # Another task may leave the block than the one that entered it.
            with contextlib.suppress(ValueError):
                _context.current.reset(self._context_token)
            self._context_token = None
        await self.aclose()

    # --- generating ------------------------------------------------------------------------------

    def generate(
        self, prompt: Prompt | None = None, **options: Unpack[GenerateOptions]
    ) -> Generation:
        """Appends to the context and generates from it.

        What a cancelled or failed generation had taken in and received stays in the context;
        `full_context` puts another in its place.

        Args:
            prompt: Text, taken as it is; a `Turn` or several, rendered by the model's chat
                template; or token ids. None: continue the context as it is.
            **options: See `GenerateOptions`.

        Returns:
            The pieces, to be iterated over; nothing is sent before that.

        Raises:
            InvalidRequestError: A value has the wrong type.
        """
        return Generation(self, prompt, options)

    async def generate_text(
        self, prompt: Prompt | None = None, **options: Unpack[GenerateOptions]
    ) -> str:
        """Like `generate`, and returns the whole text; `last_result` has the rest.

        Raises:
            DjinnError: The generation failed.
        """
        return (await Generation(self, prompt, options).result()).text

    async def chat(
        self, content: str, role: str = "user", **options: Unpack[GenerateOptions]
    ) -> str:
        """Appends one turn by the model's chat template and returns the answer's text.

        Raises:
            DjinnError: The generation failed.
        """
        return await self.generate_text(Turn(role, content), **options)

    # --- phases ----------------------------------------------------------------------------------

    def signal_phase(
        self, phase: Phase | str, *, tool_name: str = "", expected_s: float | None = None
    ) -> PhaseSignal:
        """Tells the scheduler the phase the agent enters.

        The signal is on its way when this returns; awaiting the result waits, for a bounded time,
        for the answer of an IO_WAIT. COMPUTE after IO_WAIT starts the clock of
        `last_wake_latency_s`.

        Args:
            phase: ``"IO_WAIT"``: a tool starts; ``"COMPUTE"``: the next generation is near.
            tool_name: With IO_WAIT: the tool.
            expected_s: With IO_WAIT: seconds that it is expected to take, above 0.

        Raises:
            InvalidRequestError: Another phase, or `expected_s` is not above 0.
            SessionClosedError: The session is not open.
        """
        phase = _convert.signal_phase_of(phase)
        self._check_open()
        request = agent_service_pb2.SignalPhaseRequest(
            session_id=self._session_id,
            phase=_convert.phase_to_proto(phase),
            tool_name=tool_name,
            session_token=self.token,
        )
        if expected_s is not None:
            if not 0 < expected_s < math.inf:
                problem = f"{expected_s}: must be above 0 and finite"
                raise InvalidRequestError.of_field("expected_s", problem)
            request.expected_duration.CopyFrom(_convert.duration_to_proto(expected_s))
        parent = None
        if phase is Phase.COMPUTE and self._phase is Phase.IO_WAIT:
            self._end_wake()
            span = self._span("agent.wake", None)
            self._wake = Wake(time.perf_counter(), span)
            parent = span
        elif phase is Phase.IO_WAIT:
            self._end_wake()
        self._sequence += 1
        request.sequence = self._sequence
        self._phase = phase
        span = self._span("signal_phase", parent)
        span.set_attributes({"djinn.phase": phase.value, "djinn.tool": tool_name})
        signal = Signal(request, phase, span)
        self.core.sender.post(signal)
        return PhaseSignal(signal, self.core.signal_patience_s)

    def tool(self, name: str = "", *, expected_s: float | None = None) -> ToolCall:
        """Returns a block that a tool runs in: IO_WAIT on entry, COMPUTE on exit, also on error.

        Args:
            name: The tool.
            expected_s: Seconds that it is expected to take; None: unknown.
        """
        return ToolCall(self, name, expected_s)

    def enter_tool(self, name: str, expected_s: float | None) -> None:
        """Signals IO_WAIT; several tools may run at once."""
        self.signal_phase(Phase.IO_WAIT, tool_name=name, expected_s=expected_s)
        self._tools += 1

    def leave_tool(self) -> None:
        """Signals COMPUTE when the last tool is done; nothing if the session is closed."""
        self._tools -= 1
        if self._tools == 0 and self._is_open:
            self.signal_phase(Phase.COMPUTE)

    # --- for the client's other parts ------------------------------------------------------------

    def open_request(self) -> agent_service_pb2.OpenSessionRequest:
        """Returns the request that opens the session, or finds it again."""
        try:
            return agent_service_pb2.OpenSessionRequest(
                session_id=self._session_id,
                name=self._name,
                tenant_id=self.core.tenant,
                priority=self._priority,
                model=self._model,
                expected_prompt_tokens=self._expected_prompt_tokens,
            )
        except (TypeError, ValueError) as error:
            raise InvalidRequestError(f"session: {error}") from None

    def on_opened(self, answer: agent_service_pb2.OpenSessionResponse) -> None:
        """Takes the scheduler's word for the session's token and worker."""
        self.token = answer.session_token
        # An id that was in use before: its old signals' numbers are taken.
        self._sequence = max(self._sequence, answer.session.phase_sequence)
        self.on_endpoint(answer.session.worker_endpoint)

    def on_endpoint(self, endpoint: str) -> None:
        """Moves the session to a worker; an empty endpoint says that none is known."""
        if not endpoint or endpoint == self._worker_endpoint:
            return
        if self._worker_endpoint:
            _log.info("session %s moves to the worker at %s", self._session_id, endpoint)
            self.log.is_shared = False
        self._worker_endpoint = endpoint

    def begin(self, generation: Generation) -> None:
        """Lets a generation run, if none does."""
        self._check_open()
        running = self._running() if self._running is not None else None
        if running is not None and running.active:
            raise SessionBusyError(f"session {self._session_id} runs a generation already")
        self._running = weakref.ref(generation)
        if self._phase is Phase.IO_WAIT:
            # Said for agents that forget to: they compute now, whatever they waited for.
            self.signal_phase(Phase.COMPUTE)

    def on_result(self, result: GenerateResult) -> None:
        """Takes note of a generation that ended well."""
        self.was_cut = False
        self.last_result = result

    def take_wake(self) -> Wake | None:
        """Hands the wake that is under way, if one is, to the generation that ends it."""
        wake, self._wake = self._wake, None
        return wake

    def _end_wake(self) -> None:
        if self._wake is not None:
            self._wake.span.set_attribute("djinn.wake.unused", True)
            self._wake.span.end()
            self._wake = None

    def _span(self, name: str, parent: trace.Span | None) -> trace.Span:
        return self.core.tracer.start_span(
            name,
            context=_tracing.child_context(parent),
            attributes={
                "gen_ai.conversation.id": self._session_id,
                "djinn.session.name": self._name,
            },
        )

    def _check_open(self) -> None:
        if not self._is_open:
            raise self._closed_error()

    def _closed_error(self) -> SessionClosedError:
        state = "is closed" if self._phase is Phase.CLOSED else "has not been opened"
        return SessionClosedError(f"session {self._session_id} {state}")


class ToolCall:
    """A block that a tool runs in; see `Session.tool`."""

    def __init__(self, session: Session, name: str, expected_s: float | None) -> None:
        self._session = session
        self._name = name
        self._expected_s = expected_s

    async def __aenter__(self) -> Self:
        self._session.enter_tool(self._name, self._expected_s)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._session.leave_tool()
