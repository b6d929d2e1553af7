"""What Generate does, apart from the network: checks, tokens, and the engine."""

from __future__ import annotations

import asyncio
import itertools
import time
from dataclasses import dataclass

from opentelemetry.context import Context

from services.common.errors import (
    DrainingError,
    InvalidRequestError,
    UnavailableError,
    UnsupportedError,
)
from services.worker import messages
from services.worker.front.chat import ChatTemplate, Turn
from services.worker.front.detokenize import CONTEXT_TOKENS, Detokenizer
from services.worker.front.engine_client import EngineClient
from services.worker.front.generation import Generation
from services.worker.front.session_log import SessionLog, SessionLogs
from services.worker.front.stop_strings import StopStrings
from services.worker.front.text_stream import TextStream
from services.worker.front.tokenizer import TextModel

LONG_TEXT_CHARS = 8192
"""Longer texts are tokenized in a thread, so that they hold up nobody's tokens."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What the worker serves.

    Attributes:
        name: The name the model was loaded by.
        ready: What the engine says of it.
        eos_token_ids: Ids that end a generation.
        text: Its tokenizer; None: token ids only.
        chat: Its chat template; None: it has none that can be continued.
    """

    name: str
    ready: messages.Ready
    eos_token_ids: tuple[int, ...] = ()
    text: TextModel | None = None
    chat: ChatTemplate | None = None


@dataclass(frozen=True, slots=True)
class GenerateInput:
    """A Generate as asked for: each field valid by itself, defaults filled in.

    Attributes:
        session_id: The session to continue.
        create: The session may be made, for the request carried its token.
        cache_salt: For a session that is made.
        priority: For a session that is made.
        scheduler_record: For a session that is made.
        request_id: The client's name for the call; may be empty.
        full_context: Replaces the context.
        expected_context_length: Tokens the context must have.
        append: Ids, text or turns to append; None or no ids: nothing.
        sampling: How tokens are chosen.
        max_tokens: Most tokens to generate.
        stop_strings: Texts that end the generation.
        stop_token_ids: Ids that do, besides the model's own.
        ignore_eos: The model's own do not.
        logprobs: How many likeliest tokens to report.
        return_logits: Report whole logits.
    """

    session_id: str
    create: bool
    cache_salt: str
    priority: int
    scheduler_record: bytes
    request_id: str
    full_context: list[int] | None
    expected_context_length: int | None
    append: list[int] | str | tuple[Turn, ...] | None
    sampling: messages.SamplingParams
    max_tokens: int | None
    stop_strings: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    logprobs: int | None
    return_logits: bool


class Generator:
    """Starts generations; knows what is served and whether new ones are taken."""

    def __init__(self, engine: EngineClient, logs: SessionLogs, model: ServedModel) -> None:
        """Serves `model` by `engine`, whose sessions' logs are `logs`."""
        self.model = model
        self._engine = engine
        self._logs = logs
        self._numbers = itertools.count(1)
        self._draining = False

    def drain(self) -> None:
        """Refuses new generations from now on."""
        self._draining = True

    @property
    def draining(self) -> bool:
        """True if new generations are refused."""
        return self._draining

    def check_open(self) -> None:
        """Returns if generations are taken.

        Raises:
            DrainingError: The worker is about to stop.
            UnavailableError: The engine is gone.
        """
        if self._draining:
            raise DrainingError("the worker is draining: send the request to another")
        if not self._engine.alive:
            raise UnavailableError("the worker's engine is not running")

    async def start(
        self, request: GenerateInput, received_ns: int, trace: Context | None = None
    ) -> Generation:
        """Sends a request to the engine.

        Args:
            request: What to do.
            received_ns: When it arrived, wall clock.
            trace: What its spans shall be under; None: none are recorded.

        Returns:
            Its output, to be taken with `Generation.next`; whoever takes it cancels it when done.

        Raises:
            DjinnError: It is refused; nothing was sent.
        """
        self.check_open()
        if request.stop_strings and self.model.text is None:
            raise UnsupportedError(
                f"stop_strings: the model {self.model.name} has no tokenizer; use stop_token_ids"
            )
        append = await self._tokens(request)
        log = self._logs.get(request.session_id)
        _check_not_empty(request, append, log)
        self.check_open()  # text may have taken a while

        stop_ids = set(request.stop_token_ids)
        if not request.ignore_eos:
            stop_ids.update(self.model.eos_token_ids)
        submit = messages.Submit(
            request_id=f"{next(self._numbers)}:{request.request_id}",
            session_id=request.session_id,
            create=request.create,
            cache_salt=request.cache_salt,
            priority=request.priority,
            scheduler_record=request.scheduler_record,
            full_context=request.full_context,
            expected_context_length=(
                request.expected_context_length if request.full_context is None else None
            ),
            append=append,
            sampling=request.sampling,
            max_tokens=request.max_tokens,
            stop_token_ids=sorted(stop_ids),
            logprobs=request.logprobs,
            return_logits=request.return_logits,
            received_ns=received_ns,
        )
        if log is None:
            # The engine may know the session all the same, by a command; if it does not, it says
            # so and the log is forgotten again.
            log = self._logs.ensure(request.session_id)
        text = self._text_stream(request, append, log)
        generation = Generation(submit, log, text, self._engine.send, trace)
        generation.times.submitted_ns = time.time_ns()
        self._engine.submit(generation)
        return generation

    async def _tokens(self, request: GenerateInput) -> list[int]:
        """Returns what the request appends, as token ids."""
        append = request.append
        if append is None or isinstance(append, list):
            return append or []
        text = self.model.text
        field_name = "append_text" if isinstance(append, str) else "append_chat"
        if text is None:
            raise UnsupportedError(
                f"{field_name}: the model {self.model.name} has no tokenizer; use append_token_ids"
            )
        length, last = self._context_end(request)
        if isinstance(append, str):
            if len(append) > LONG_TEXT_CHARS:
                return await asyncio.to_thread(text.encode, append, first=length == 0)
            return text.encode(append, first=length == 0)
        chat = self.model.chat
        if chat is None:
            raise UnsupportedError(
                f"append_chat: the model {self.model.name} has no chat template that can be "
                "continued; use append_text or append_token_ids"
            )
        if sum(len(turn.content) for turn in append) > LONG_TEXT_CHARS:
            return await asyncio.to_thread(chat.render, append, last_token=last, empty=length == 0)
        return chat.render(append, last_token=last, empty=length == 0)

    def _context_end(self, request: GenerateInput) -> tuple[int, int | None]:
        """Returns the length of the context to append to and its last token, as far as known."""
        if request.full_context is not None:
            context = request.full_context
            return len(context), context[-1] if context else None
        log = self._logs.get(request.session_id)
        if log is not None:
            return log.length, log.last_token()
        return request.expected_context_length or 0, None

    def _text_stream(
        self, request: GenerateInput, append: list[int], log: SessionLog
    ) -> TextStream:
        text = self.model.text
        if text is None:
            return TextStream(None)
        tail = append[-CONTEXT_TOKENS:]
        if not tail:
            last = log.last_token()
            tail = (request.full_context or ([] if last is None else [last]))[-CONTEXT_TOKENS:]
        stops = StopStrings(request.stop_strings) if request.stop_strings else None
        return TextStream(Detokenizer(text.tokenizer, tail), stops)


def _check_not_empty(request: GenerateInput, append: list[int], log: SessionLog | None) -> None:
    if append:
        return
    if request.full_context is not None:
        context = len(request.full_context)
    elif log is not None:
        context = log.length
    elif request.create:
        context = request.expected_context_length or 0
    else:
        return  # the engine says that it does not know the session
    if context == 0:
        raise InvalidRequestError.of_field(
            "append_token_ids", "empty prompt: context and append together hold no token"
        )
