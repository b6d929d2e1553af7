"""Any OpenAI-compatible server, through its completions API with streaming.

Such a server knows no sessions: each request carries the whole history, and nothing is sent when a
tool starts or returns. The signals in a run's records are then the moments when a server with
signals would have been told, so a wake counts from the tool's return to the first token, as it does
everywhere.

Prompts go out as token ids, and ``return_token_ids`` (vLLM's name) has the server say which ids it
generated, so that the history is exact. A server without either gets text; see `OpenAIOptions`.
``cache_salt`` (vLLM's too) keeps a run from finding the prefixes of an earlier one.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import msgspec

from loadgen.errors import LoadgenError, ServerError
from loadgen.targets.base import Delta, Generation, Outcome, TargetError, TargetInfo
from loadgen.targets.openai_stream import Chunk, Usage, check, events, reason_of, unavailable
from loadgen.targets.options import OpenAIOptions
from loadgen.workload import ChatPrompt, Prompt

API_KEY_VARIABLE = "OPENAI_API_KEY"
"""The environment variable of the bearer token, as for OpenAI's own client."""

CONNECT_TIMEOUT_S = 10.0
PROBE_TIMEOUT_S = 120.0
KEEP_ALIVE_S = 2.0
"""Servers close idle connections, uvicorn after 5 s; to be closed while sending fails a request."""
PERMANENT_REASONS = frozenset(
    {
        "BAD_REQUEST",
        "UNAUTHORIZED",
        "FORBIDDEN",
        "NOT_FOUND",
        "UNPROCESSABLE_ENTITY",
        "NO_TOKEN_IDS",
    }
)
"""Failures that asking again does not mend."""
LINE_LIMIT_BYTES = 1 << 22
"""The first chunk repeats the prompt's ids in one line."""

WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life")
"""Common words, each one token of nearly every tokenizer when a blank precedes it."""


class _Model(msgspec.Struct, frozen=True):
    id: str
    max_model_len: int | None = None


class _Models(msgspec.Struct, frozen=True):
    data: tuple[_Model, ...] = ()


class OpenAITarget:
    """A connection to an OpenAI-compatible server; use `connect`."""

    name = "openai"

    def __init__(
        self,
        http: aiohttp.ClientSession,
        server: str,
        model: _Model,
        options: OpenAIOptions,
        salt: str,
    ) -> None:
        self._http = http
        self._server = server
        self._model = model
        self._salt = salt
        self.options = options

    @classmethod
    async def connect(
        cls, server: str, options: OpenAIOptions, *, tenant: str = ""
    ) -> OpenAITarget:
        """Connects to a server.

        Args:
            server: Its URL, with or without ``/v1`` at the end.
            options: How to speak to it.
            tenant: Whose agents those are that have no tenant of their own.

        Raises:
            LoadgenError: The URL is none, or the server has no such model.
            ServerError: Nobody answers there, or not as such a server does.
        """
        http = aiohttp.ClientSession(
            base_url=_base_url(server),
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
            headers=_headers(),
            read_bufsize=LINE_LIMIT_BYTES,
        )
        try:
            model = await _choose_model(http, server, options.model)
        except BaseException:
            await http.close()
            raise
        return cls(http, server, model, options, tenant)

    async def info(self) -> TargetInfo:
        """Asks for one token, to see that the server understands what a run will send.

        Raises:
            LoadgenError: It does not, and never will.
            TargetError: It could not answer.
        """
        last_id = self.options.vocab_size - 1
        probe = OpenAIGeneration(self, WORDS[0] if self.options.text else [last_id], 1, "")
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                async for _ in probe:
                    pass
        except TimeoutError:
            raise TargetError("TIMEOUT", f"no token within {PROBE_TIMEOUT_S:g} s") from None
        except TargetError as error:
            if error.reason not in PERMANENT_REASONS:
                raise
            prompt = "of text" if self.options.text else f"of token id {last_id}"
            raise LoadgenError(
                f"{self._server}: a prompt {prompt} fails: {error.message}"
            ) from None
        return TargetInfo(
            vocab_size=self.options.vocab_size,
            max_context_length=self._model.max_model_len or 0,
            has_chat=False,
            has_tokenizer=False,
            model={**msgspec.to_builtins(self.options), "model": self._model.id},
        )

    async def stats(self) -> dict[str, float]:
        """Returns nothing: the API has no counters, so a report says that they are unknown."""
        return {}

    def session(self, name: str, tenant: str, first_prompt_tokens: int) -> OpenAISession:
        return OpenAISession(self, name, tenant or self._salt)

    def complete(
        self, prompt: list[int] | str, max_tokens: int, salt: str
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        """Returns a streamed completion; it is sent when the context is entered."""
        body: dict[str, Any] = {
            "model": self._model.id,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            # Where chunks do not have token ids, running counts tell how many tokens they are.
            "stream_options": {
                "include_usage": True,
                "continuous_usage_stats": self.options.text,
            },
            # Random ids lead a model anywhere, also to its end-of-sequence.
            "ignore_eos": True,
        }
        if not self.options.text:
            body["return_token_ids"] = True
        if salt:
            body["cache_salt"] = salt
        return self._http.post(
            "completions",
            data=msgspec.json.encode(body),
            headers={"Content-Type": "application/json"},
        )

    async def aclose(self) -> None:
        await self._http.close()


class OpenAISession:
    """One agent's history; the server knows nothing of it between requests."""

    def __init__(self, target: OpenAITarget, name: str, salt: str) -> None:
        self._target = target
        self._name = name
        self._salt = salt
        self._ids: list[int] = []
        self._text = ""

    @property
    def session_id(self) -> str:
        return self._name

    async def open(self) -> None:
        """Does nothing: there is nothing to open."""

    def generate(self, prompt: Prompt, max_tokens: int, timeout_s: float) -> Generation:
        if isinstance(prompt, ChatPrompt):
            raise TargetError(
                "NO_CHAT", "conversations are not sent to an OpenAI-compatible server"
            )
        history: list[int] | str
        if self._target.options.text:
            words = " ".join(WORDS[number % len(WORDS)] for number in prompt.ids)
            history = self._text = f"{self._text} {words}".lstrip()
        else:
            self._ids += prompt.ids
            history = self._ids
        return OpenAIGeneration(self._target, history, max_tokens, self._salt, self._generated)

    def _generated(self, delta: Delta) -> None:
        self._ids += delta.token_ids
        self._text += delta.text

    async def _nothing(self) -> None:
        pass

    def tool_started(self, name: str, expected_s: float | None) -> Awaitable[None]:
        """Sends nothing."""
        return self._nothing()

    def tool_ended(self) -> None:
        """Sends nothing."""

    async def close(self) -> None:
        """Does nothing: there is nothing to close."""


class OpenAIGeneration:
    """See `base.Generation`."""

    def __init__(
        self,
        target: OpenAITarget,
        prompt: list[int] | str,
        max_tokens: int,
        salt: str,
        on_delta: Callable[[Delta], None] | None = None,
    ) -> None:
        self._target = target
        self._prompt = prompt
        self._max_tokens = max_tokens
        self._salt = salt
        self._on_delta = on_delta
        self._output_tokens = 0
        self._finish_reason = ""
        self._usage: Usage | None = None

    async def __aiter__(self) -> AsyncIterator[Delta]:
        try:
            async with self._target.complete(self._prompt, self._max_tokens, self._salt) as answer:
                await check(answer)
                async for chunk in events(answer):
                    delta = self._take(chunk)
                    if delta is None:
                        continue
                    if self._on_delta is not None:
                        self._on_delta(delta)
                    yield delta
        except (aiohttp.ClientError, OSError) as error:
            raise unavailable(error) from error

    def _take(self, chunk: Chunk) -> Delta | None:
        """Returns what a chunk adds; None: nothing."""
        if chunk.error is not None:
            code = chunk.error.code
            reason = reason_of(code) if isinstance(code, int) else "SERVER_ERROR"
            raise TargetError(reason, chunk.error.message)
        text = ""
        ids: tuple[int, ...] = ()
        for choice in chunk.choices:
            text += choice.text or ""
            ids += choice.token_ids or ()
            self._finish_reason = choice.finish_reason or self._finish_reason
        self._usage = chunk.usage or self._usage
        if not self._target.options.text and text and not ids:
            raise TargetError(
                "NO_TOKEN_IDS",
                "the server does not return the ids of its tokens; --openai-text does without",
            )
        count = len(ids) or self._uncounted(chunk.usage, text)
        self._output_tokens += count
        return Delta(count, text, ids) if count or text else None

    def _uncounted(self, usage: Usage | None, text: str) -> int:
        """Returns how many tokens came without their ids; a piece of text is one if nobody says."""
        if usage is not None:
            return max(0, usage.completion_tokens - self._output_tokens)
        return 1 if text else 0

    async def outcome(self) -> Outcome:
        usage = self._usage or Usage()
        details = usage.prompt_tokens_details
        cached = details.cached_tokens if details is not None else None
        return Outcome(
            finish_reason=self._finish_reason,
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=cached or 0,
            # 0, which no request prefills, says that the server does not tell.
            prefilled_tokens=0 if cached is None else usage.prompt_tokens - cached,
        )


def _headers() -> dict[str, str]:
    key = os.environ.get(API_KEY_VARIABLE)
    return {"Authorization": f"Bearer {key}"} if key else {}


def _base_url(server: str) -> str:
    """Returns the URL that the API's paths are relative to."""
    parts = urlsplit(server)
    if parts.scheme not in {"http", "https"} or not parts.netloc:
        raise LoadgenError(f"{server or 'no URL'}: expected a URL such as http://localhost:8000")
    return f"{server.rstrip('/').removesuffix('/v1')}/v1/"


async def _choose_model(http: aiohttp.ClientSession, server: str, name: str) -> _Model:
    """Returns a model of the server's: the one of that name, or the first."""
    try:
        async with http.get("models") as answer:
            await check(answer)
            models = msgspec.json.decode(await answer.read(), type=_Models).data
    except (aiohttp.ClientError, OSError) as error:
        raise ServerError(f"{server}: {unavailable(error).message}") from None
    except (TargetError, msgspec.DecodeError) as error:
        raise ServerError(f"{server}: /v1/models: {error}") from None
    for model in models:
        if name in {"", model.id}:
            return model
    known = ", ".join(model.id for model in models) or "none"
    raise LoadgenError(f"--model {name}: {server} has {known}")
