"""One Generate between the engine, which pushes, and its client, who takes at his own pace."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from opentelemetry.context import Context

from services.common.errors import DjinnError, ExhaustedError, from_info
from services.worker import messages
from services.worker.front.session_log import SessionLog
from services.worker.front.text_stream import TextStream

MAX_PENDING_LOGITS_BYTES = 256 << 20
"""Logits that may wait for a client before its request is ended: they alone grow without bound."""


@dataclass(slots=True)
class Delta:
    """Tokens that have come since the last delta was taken; one entry each in non-empty lists.

    Attributes:
        token_ids: The tokens.
        text: Text that has become certain, in order.
        logprobs: If asked for.
        logits: If asked for: vocab_size little-endian float32 each.
    """

    token_ids: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    logprobs: list[messages.PositionLogprobs] = field(default_factory=list)
    logits: list[bytes] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.token_ids or self.text)


@dataclass(frozen=True, slots=True)
class Begun:
    """The request's first step has begun.

    Attributes:
        started: What the engine says of it.
        appended: What was appended to the context, as token ids.
    """

    started: messages.Started
    appended: list[int]


@dataclass(frozen=True, slots=True)
class End:
    """A request has ended well.

    Attributes:
        reason: Why.
        prompt_tokens: Context and append together.
        cached_tokens: Of these, tokens whose KV was found.
        prefilled_tokens: Tokens prefilled for it.
        completion_tokens: Tokens streamed to the client.
        context_length: Tokens in the context now.
        generation: The session's, after it.
        stop_string: The stop string that ended it; empty: none.
    """

    reason: messages.FinishReason
    prompt_tokens: int
    cached_tokens: int
    prefilled_tokens: int
    completion_tokens: int
    context_length: int
    generation: int
    stop_string: str = ""


Event = Begun | Delta | End


@dataclass(slots=True)
class Times:
    """When a request came how far: `time.time_ns`; 0 is never.

    Attributes:
        received_ns: It reached the front.
        submitted_ns: It was sent to the engine.
        collected_ns: The engine had its first token from the device.
        first_token_ns: Its first token reached the front.
        first_sent_ns: Its first token was taken to be sent to the client.
        last_token_ns: Its last token so far did.
        ended_ns: It ended.
    """

    received_ns: int
    submitted_ns: int = 0
    collected_ns: int = 0
    first_token_ns: int = 0
    first_sent_ns: int = 0
    last_token_ns: int = 0
    ended_ns: int = 0


class Generation:
    """Collects what the engine makes for one request until the client takes it.

    The engine's side (`on_*`) never waits: what a slow client has not taken is merged into one
    delta, whose size the context limit bounds, and logits have a bound of their own.
    """

    def __init__(
        self,
        submit: messages.Submit,
        log: SessionLog,
        text: TextStream,
        send: Callable[[messages.ToEngine], None],
        trace: Context | None = None,
    ) -> None:
        """Prepares for a request's output; sends nothing.

        Args:
            submit: The request.
            log: Its session's, kept up to date here.
            text: Makes text of its tokens.
            send: Sends a message to the engine.
            trace: What its spans shall be under.
        """
        self.submit = submit
        self.trace = trace
        self.times = Times(submit.received_ns)
        self.started: messages.Started | None = None
        self.token_count = 0
        self.error: DjinnError | None = None
        self.end: End | None = None
        self._log = log
        self._text = text
        self._send = send
        self._begun: Begun | None = None
        self._pending = Delta()
        self._pending_logits_bytes = 0
        self._stop: str | None = None
        self._closed = False
        self._over = False
        self._waiter: asyncio.Future[None] | None = None

    # --- the engine's side ---

    def take(self, message: messages.OfRequest) -> None:
        """Takes what the engine says of the request."""
        match message:
            case messages.Tokens():
                self.on_tokens(message)
            case messages.Started():
                self.on_started(message)
            case messages.Finished():
                self.on_finished(message)
            case messages.Rejected():
                self.on_rejected(message)

    def on_started(self, started: messages.Started) -> None:
        """The first step has begun."""
        self.started = started
        self._begun = Begun(started, self.submit.append)
        last = self.submit.append or self.submit.full_context
        before = self._log.last_token() if self._log.length == started.context_length else None
        self._log.begin(started.context_length, last[-1] if last else before)
        self._wake()

    def on_tokens(self, tokens: messages.Tokens) -> None:
        """A step has made tokens; those behind a stop string are ignored."""
        if self._stop is not None or self._over:
            return
        now = time.time_ns()
        self.times.last_token_ns = now
        if not self.times.first_token_ns:
            self.times.first_token_ns = now
            self.times.collected_ns = tokens.collected_ns
        taken, text, self._stop = self._text.push(tokens.token_ids)
        token_ids = tokens.token_ids[:taken]
        self.token_count += taken
        self._log.extend(token_ids)
        pending = self._pending
        pending.token_ids += token_ids
        pending.logprobs += tokens.logprobs[:taken]
        if text:
            pending.text.append(text)
        if tokens.logits:
            pending.logits += tokens.logits[:taken]
            self._pending_logits_bytes += sum(map(len, tokens.logits[:taken]))
            if self._pending_logits_bytes > MAX_PENDING_LOGITS_BYTES:
                self._overflow()
        if self._stop is not None:
            self._send(
                messages.StopAt(self.submit.request_id, self.submit.session_id, self._length())
            )
        self._wake()

    def on_finished(self, finished: messages.Finished) -> None:
        """The engine has ended the request well."""
        if self._over:
            return
        text = ""
        if self._stop is None:
            text, self._stop = self._text.flush()
        reason, length = finished.reason, finished.context_length
        if self._stop is not None:
            # The engine may have ended for a reason of its own before it saw StopAt; the client
            # has been given the tokens up to the stop string and nothing beyond.
            reason, length = messages.FinishReason.STOP, min(length, self._length())
        if text:
            self._pending.text.append(text)
        # What the engine holds counts for the next request, not what this one's client was given.
        self._log.cut(finished.context_length)
        started = self.started
        self.end = End(
            reason=reason,
            prompt_tokens=started.context_length if started else 0,
            cached_tokens=started.cached_tokens if started else 0,
            prefilled_tokens=finished.prefilled_tokens,
            completion_tokens=self.token_count,
            context_length=length,
            generation=finished.generation,
            stop_string=self._stop or "",
        )
        self._finish()

    def fail(self, error: DjinnError) -> None:
        """The request has failed, or its engine has; does nothing if it is over."""
        if self._over:
            return
        self.error = error
        self._finish()

    def on_rejected(self, rejected: messages.Rejected) -> None:
        """The engine has refused, failed or cancelled the request."""
        self.fail(from_info(rejected.error))

    # --- the client's side ---

    async def next(self) -> Event | None:
        """Waits for something new and returns it; None after the end.

        Returns:
            `Begun` first, then each time all that has come since as one `Delta`, then `End`.

        Raises:
            DjinnError: The request failed.
        """
        while True:
            if self._begun is not None:
                begun, self._begun = self._begun, None
                return begun
            if self._pending:
                delta, self._pending = self._pending, Delta()
                self._pending_logits_bytes = 0
                if not self.times.first_sent_ns:
                    self.times.first_sent_ns = time.time_ns()
                return delta
            if self._over:
                if self.error is not None:
                    raise self.error
                end, self._closed = (None if self._closed else self.end), True
                return end
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def cancel(self) -> None:
        """The client went away: ends the request in the engine, unless it is over."""
        if not self._over:
            self._send(messages.Abort(self.submit.request_id))

    @property
    def over(self) -> bool:
        """True once nothing more will come from the engine."""
        return self._over

    def _length(self) -> int:
        """Returns the length of the context up to the last token taken."""
        prompt = self.started.context_length if self.started is not None else 0
        return prompt + self.token_count

    def _overflow(self) -> None:
        self._send(messages.Abort(self.submit.request_id))
        self._pending = Delta()
        self.fail(
            ExhaustedError(
                f"the client left more than {MAX_PENDING_LOGITS_BYTES} bytes of logits unread",
                metadata={"limit_bytes": str(MAX_PENDING_LOGITS_BYTES)},
            )
        )

    def _finish(self) -> None:
        self._over = True
        self.times.ended_ns = time.time_ns()
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
