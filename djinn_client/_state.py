"""What is behind a session: its token log, its phase and its ties to scheduler and worker."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
import uuid
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

from opentelemetry import trace

from djinn.v1 import agent_service_pb2
from djinn_client import _convert, _tracing
from djinn_client._errors import (
    DeadlineExceededError,
    DjinnError,
    InvalidRequestError,
    SessionBusyError,
    SessionClosedError,
    UnavailableError,
)
from djinn_client._signals import PhaseSignal, Signal
from djinn_client._transcript import TokenLog
from djinn_client._types import GenerateResult, Phase

if TYPE_CHECKING:
    from djinn_client._core import Core
    from djinn_client._generation import Generation

_log = logging.getLogger("djinn_client")


@dataclass(frozen=True, slots=True)
class Wake:
    """A COMPUTE that was sent and whose generation is still to come."""

    sent_at: float
    span: trace.Span


class SessionState:
    """The state of one session and all that changes it.

    Args:
        core: The connection it lives on.
        name: A name for people.
        session_id: Its id; None: one is made.
        priority: For the scheduler.
        fork_of: Whose context it starts with.
        model: The model wanted.
        expected_prompt_tokens: For placement.

    Attributes:
        log: Its context, kept up to date by the generation that runs.
        phase: The phase last signalled.
        is_open: Between `open` and `close`.
        token: The scheduler's, to be sent with each call.
        worker_endpoint: host:port of its worker; empty: none is known.
        was_cut: A call ended in a way that its worker may not have noticed yet.
        eos_token_ids: Its model's; None: not asked for yet.
        last_wake_latency_s: See `Session`.
        last_result: See `Session`.
    """

    def __init__(
        self,
        core: Core,
        *,
        name: str,
        session_id: str | None,
        priority: int,
        fork_of: SessionState | None,
        model: str,
        expected_prompt_tokens: int,
    ) -> None:
        self.core = core
        self.name = name
        self.session_id = session_id or uuid.uuid4().hex
        self.log = TokenLog()
        self.phase = Phase.OPEN
        self.is_open = False
        self.token = b""
        self.worker_endpoint = ""
        self.was_cut = False
        self.eos_token_ids: frozenset[int] | None = None
        self.last_wake_latency_s: float | None = None
        self.last_result: GenerateResult | None = None
        self._priority = priority
        self._fork_of = fork_of
        self._model = model
        self._expected_prompt_tokens = expected_prompt_tokens
        self._sequence = 0
        self._tools = 0
        self._wake: Wake | None = None
        self._running: weakref.ref[Generation] | None = None

    # --- life ------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Opens the session at the scheduler and learns its worker. Idempotent.

        Raises:
            ExhaustedError: No more sessions are admitted now; `retry_after_s` says when.
            UnavailableError: No scheduler or no worker came within the retry policy's time.
            SessionClosedError: It has been closed.
            DjinnError: It was refused.
        """
        if self.is_open:
            return
        if self.phase is Phase.CLOSED:
            raise self._closed_error()
        request = self.open_request()
        answer = await self.core.call_until_available(self.core.agents.OpenSession, request)
        self.is_open = True
        if self._fork_of is not None:
            self.log.ids[:] = self._fork_of.log.ids
            self.log.is_shared = False
            self._fork_of = None
        self.core.sessions[self.session_id] = self
        self.on_opened(answer)
        self.core.note_epoch(answer.scheduler_epoch)
        self.core.sender.start()

    async def close(self) -> None:
        """Ends the session: cancels what runs and frees its KV everywhere. Idempotent.

        An unreachable scheduler is no error: it is tried again in the background until the client
        is closed.
        """
        if not self.is_open:
            self.phase = Phase.CLOSED
            return
        self.is_open = False
        self.phase = Phase.CLOSED
        running = self._running() if self._running is not None else None
        if running is not None:
            await running.aclose()
        self._end_wake()
        self.core.sessions.pop(self.session_id, None)
        # A task of its own, so that cancelling the caller does not leave the session open.
        first_try = asyncio.Event()
        closing = self.core.in_background(lambda: self.say_closed(first_try))
        tried = asyncio.create_task(first_try.wait())
        try:
            await asyncio.wait({closing, tried}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            tried.cancel()

    async def say_closed(self, first_try: asyncio.Event | None = None) -> None:
        """Tells the scheduler of the session's end until it has heard.

        Args:
            first_try: Set when that takes more than one call.
        """
        await self.core.sender.forget(self.session_id, self.core.signal_patience_s)
        request = agent_service_pb2.CloseSessionRequest(session_id=self.session_id)
        try:
            with contextlib.suppress(UnavailableError, DeadlineExceededError):
                await self.core.call(self.core.agents.CloseSession, request)
                return
            if first_try is not None:
                first_try.set()
            await self.core.call_until_available(self.core.agents.CloseSession, request)
        except DjinnError as error:
            _log.warning("session %s was not closed: %s", self.session_id, error.message)

    # --- phases ----------------------------------------------------------------------------------

    def signal_phase(
        self, phase: Phase | str, *, tool_name: str = "", expected_s: float | None = None
    ) -> PhaseSignal:
        """Sends a signal; see `Session.signal_phase`."""
        phase = _convert.signal_phase_of(phase)
        self._check_open()
        request = agent_service_pb2.SignalPhaseRequest(
            session_id=self.session_id,
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
        if phase is Phase.COMPUTE and self.phase is Phase.IO_WAIT:
            self._end_wake()
            span = self._span("agent.wake", None)
            self._wake = Wake(time.perf_counter(), span)
            parent = span
        elif phase is Phase.IO_WAIT:
            self._end_wake()
        self._sequence += 1
        request.sequence = self._sequence
        self.phase = phase
        span = self._span("signal_phase", parent)
        span.set_attributes({"djinn.phase": phase.value, "djinn.tool": tool_name})
        signal = Signal(request, phase, span)
        self.core.sender.post(signal)
        return PhaseSignal(signal, self.core.signal_patience_s)

    def enter_tool(self, name: str, expected_s: float | None) -> None:
        """Signals IO_WAIT; several tools may run at once."""
        self.signal_phase(Phase.IO_WAIT, tool_name=name, expected_s=expected_s)
        self._tools += 1

    def leave_tool(self) -> None:
        """Signals COMPUTE when the last tool is done; nothing if the session is closed."""
        self._tools -= 1
        if self._tools == 0 and self.is_open:
            self.signal_phase(Phase.COMPUTE)

    # --- towards scheduler and worker ------------------------------------------------------------

    def open_request(self) -> agent_service_pb2.OpenSessionRequest:
        """Returns the request that opens the session, or finds it again."""
        try:
            return agent_service_pb2.OpenSessionRequest(
                session_id=self.session_id,
                name=self.name,
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
        if not endpoint or endpoint == self.worker_endpoint:
            return
        if self.worker_endpoint:
            _log.info("session %s moves to the worker at %s", self.session_id, endpoint)
            self.log.is_shared = False
        self.worker_endpoint = endpoint

    def begin(self, generation: Generation) -> None:
        """Lets a generation run, if none does."""
        self._check_open()
        running = self._running() if self._running is not None else None
        if running is not None and running.active:
            raise SessionBusyError(
                f"session {self.session_id} runs a generation already: read it to its end, or"
                " close it"
            )
        self._running = weakref.ref(generation)
        if self.phase is Phase.IO_WAIT:
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
                "gen_ai.conversation.id": self.session_id,
                "djinn.session.name": self.name,
            },
        )

    def _check_open(self) -> None:
        if not self.is_open:
            raise self._closed_error()

    def _closed_error(self) -> SessionClosedError:
        state = "is closed" if self.phase is Phase.CLOSED else "has not been opened"
        return SessionClosedError(f"session {self.session_id} {state}")
