"""The stream of a completion, as OpenAI-compatible servers send it: server-sent events of JSON."""

from __future__ import annotations

from collections.abc import AsyncIterator
from http import HTTPStatus

import aiohttp
import msgspec

from loadgen.targets.base import TargetError


class PromptDetails(msgspec.Struct, frozen=True):
    """Of the prompt's tokens, those whose KV was found."""

    cached_tokens: int | None = None


class Usage(msgspec.Struct, frozen=True):
    """Tokens of a request until now."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: PromptDetails | None = None


class Choice(msgspec.Struct, frozen=True):
    """A piece of the answer; the ids of its tokens where the server tells them."""

    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    finish_reason: str | None = None


class Problem(msgspec.Struct, frozen=True):
    """What an answer, or a stream that has begun already, says went wrong."""

    message: str = ""
    code: int | str | None = None


class Chunk(msgspec.Struct, frozen=True):
    """One event of a stream."""

    choices: tuple[Choice, ...] = ()
    usage: Usage | None = None
    error: Problem | None = None


_decoder = msgspec.json.Decoder(Chunk)


async def events(answer: aiohttp.ClientResponse) -> AsyncIterator[Chunk]:
    """Yields a stream's chunks up to its end.

    Raises:
        TargetError: It is not such a stream, or was cut off.
    """
    try:
        async for line in answer.content:
            if not line.startswith(b"data:"):
                continue
            data = line[len(b"data:") :].strip()
            if data == b"[DONE]":
                return
            yield _decoder.decode(data)
    except (msgspec.DecodeError, ValueError) as error:
        raise TargetError("BAD_ANSWER", f"not a chunk of a completion: {error}") from None
    raise TargetError("STREAM_CUT", "the stream ended before it was complete")


async def check(answer: aiohttp.ClientResponse) -> None:
    """Checks that an answer is a success.

    Raises:
        TargetError: It is not; the reason is the status's name.
    """
    if answer.status == HTTPStatus.OK:
        return
    body = await answer.read()
    try:
        problem = msgspec.json.decode(body, type=Chunk).error
    except msgspec.DecodeError:
        problem = None
    text = problem.message if problem is not None else body.decode(errors="replace")
    first_line = next(iter(text.strip().splitlines()), "") or (answer.reason or "no reason given")
    raise TargetError(reason_of(answer.status), first_line, _retry_after_s(answer))


def reason_of(status: int) -> str:
    """Returns an HTTP status as a reason, such as ``NOT_FOUND``."""
    try:
        return HTTPStatus(status).name
    except ValueError:
        return f"HTTP_{status}"


def _retry_after_s(answer: aiohttp.ClientResponse) -> float | None:
    given = answer.headers.get("Retry-After", "")
    return float(given) if given.isdigit() else None


def unavailable(error: Exception) -> TargetError:
    """Returns what a connection's failure is to an agent."""
    return TargetError("UNAVAILABLE", str(error) or type(error).__name__)
