"""One agent's session."""

from __future__ import annotations

import contextlib
from contextvars import Token
from types import TracebackType
from typing import Self, Unpack

from djinn_client import _context
from djinn_client._generation import Generation
from djinn_client._signals import PhaseSignal
from djinn_client._state import SessionState
from djinn_client._types import GenerateOptions, GenerateResult, Phase, Prompt, Turn


class Session:
    """An agent's context on a worker, and the phase the agent is in.

    Made by `Client.session`; entered with ``async with``, or with `open` and `aclose`. A session
    runs one generation at a time. Not for use from several threads.
    """

    def __init__(self, state: SessionState) -> None:
        self._state = state
        self._context_token: Token[Session | None] | None = None

    # --- what it is ------------------------------------------------------------------------------

    @property
    def session_id(self) -> str:
        """Unique among all sessions."""
        return self._state.session_id

    @property
    def name(self) -> str:
        """The name for people."""
        return self._state.name

    @property
    def phase(self) -> Phase:
        """The phase last signalled."""
        return self._state.phase

    @property
    def context(self) -> tuple[int, ...]:
        """All token ids of the session so far, as far as they have been received."""
        return tuple(self._state.log.ids)

    @property
    def context_length(self) -> int:
        """How many token ids that is."""
        return len(self._state.log.ids)

    @property
    def worker_endpoint(self) -> str:
        """host:port of the worker that the next generation is sent to."""
        return self._state.worker_endpoint

    @property
    def last_wake_latency_s(self) -> float | None:
        """Seconds from the last wake's COMPUTE sent to its first token id received.

        On the client's clock; None before the first wake.
        """
        return self._state.last_wake_latency_s

    @property
    def last_result(self) -> GenerateResult | None:
        """The outcome of the last generation that ended well."""
        return self._state.last_result

    def __repr__(self) -> str:
        return f"<Session {self.session_id} {self.phase} {self.context_length} tokens>"

    # --- life ------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Opens the session at the scheduler and learns its worker. Idempotent.

        Raises:
            ExhaustedError: No more sessions are admitted now; `retry_after_s` says when.
            UnavailableError: No scheduler or no worker came within the retry policy's time.
            SessionClosedError: It has been closed.
            DjinnError: It was refused.
        """
        await self._state.open()

    async def aclose(self) -> None:
        """Ends the session: cancels what runs and frees its KV everywhere. Idempotent.

        An unreachable scheduler is no error: it is tried again in the background until the client
        is closed.
        """
        await self._state.close()

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
        return Generation(self._state, prompt, options)

    async def generate_text(
        self, prompt: Prompt | None = None, **options: Unpack[GenerateOptions]
    ) -> str:
        """Like `generate`, and returns the whole text; `last_result` has the rest.

        Raises:
            DjinnError: The generation failed.
        """
        return (await Generation(self._state, prompt, options).result()).text

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
        return self._state.signal_phase(phase, tool_name=tool_name, expected_s=expected_s)

    def tool(self, name: str = "", *, expected_s: float | None = None) -> ToolCall:
        """Returns a block that a tool runs in: IO_WAIT on entry, COMPUTE on exit, also on error.

        Args:
            name: The tool.
            expected_s: Seconds that it is expected to take; None: unknown. It also tells the
                scheduler how long not to take the client for lost; see "Expiry" in
                docs/protocol.md.
        """
        return ToolCall(self._state, name, expected_s)


class ToolCall:
    """A block that a tool runs in; see `Session.tool`."""

    def __init__(self, state: SessionState, name: str, expected_s: float | None) -> None:
        self._state = state
        self._name = name
        self._expected_s = expected_s

    async def __aenter__(self) -> Self:
        self._state.enter_tool(self._name, self._expected_s)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._state.leave_tool()
