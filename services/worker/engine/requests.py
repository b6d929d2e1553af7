"""What a Generate does to its session: checks, the token log, and the end of a generation.

Functions over a `Session`; they raise `DjinnError`s and leave the session as it was if they do.
"""

from __future__ import annotations

import time

from services.common.errors import (
    ContextMismatchError,
    ContextTooLongError,
    InvalidRequestError,
    SessionBusyError,
)
from services.worker.engine.block_manager import BlockManager
from services.worker.engine.sequence import Request, Session
from services.worker.messages import FinishReason, KvSource, Submit


def begin(
    session: Session,
    submit: Submit,
    blocks: BlockManager,
    *,
    arrival: int,
    vocab_size: int,
    max_context_length: int,
) -> Request:
    """Gives a session its next request: cuts and extends the log and bumps the generation.

    Raises:
        SessionBusyError: It has a request.
        ContextMismatchError: `expected_context_length` is not the log's.
        InvalidRequestError: There is nothing to compute, or a token id is out of the vocabulary.
        ContextTooLongError: Prompt and output would not fit.
    """
    if session.request is not None:
        raise SessionBusyError(
            f"session {session.session_id!r} runs request {session.request.request_id!r}",
            metadata={"session_id": session.session_id},
        )
    _check_tokens("append", submit.append, vocab_size)
    kept = len(session.tokens)
    extension = submit.append
    if submit.full_context is not None:
        _check_tokens("full_context", submit.full_context, vocab_size)
        kept = session.common_prefix(submit.full_context)
        extension = submit.full_context[kept:] + submit.append
    elif submit.expected_context_length not in (None, kept):
        raise ContextMismatchError(
            f"expected_context_length: {submit.expected_context_length}, but the worker has "
            f"{kept} tokens of session {session.session_id!r}",
            metadata={"session_id": session.session_id, "context_length": str(kept)},
        )
    prompt_length = kept + len(extension)
    if prompt_length == 0:
        raise InvalidRequestError.of_field("append", "the prompt is empty")
    room = max_context_length - prompt_length
    wanted = 1 if submit.max_tokens is None else submit.max_tokens
    if room < wanted:
        raise ContextTooLongError(
            f"context: {prompt_length} prompt tokens and {wanted} new ones, "
            f"but at most {max_context_length} fit",
            metadata={"limit": str(max_context_length), "prompt_tokens": str(prompt_length)},
        )
    wake = session.known_tokens > 0
    if kept < len(session.tokens):
        session.cut(kept, blocks.block_size_tokens)
    # The last token is always computed, since its logits choose the next one.
    blocks.truncate(session.kv, min(kept, prompt_length - 1))
    session.tokens.extend(extension)
    session.generation += 1
    session.awaited_until_ns = 0
    session.request = Request(
        submit=submit,
        arrival=arrival,
        queued_ns=time.time_ns(),
        prompt_length=prompt_length,
        max_tokens=room if submit.max_tokens is None else submit.max_tokens,
        wake=wake,
    )
    return session.request


def end(session: Session, blocks: BlockManager) -> Request:
    """Takes a session's request away and bumps the generation.

    The KV of a token that a launched step samples and the log will not have is cut off.

    Returns:
        The request.
    """
    request = session.request
    assert request is not None
    session.request = None
    blocks.truncate(session.kv, len(session.tokens))
    session.last_request_id = request.request_id
    session.generation += 1
    session.source = KvSource()
    session.last_generate_ns = session.used_ns = time.time_ns()
    return request


def accept_token(session: Session, token_id: int) -> FinishReason | None:
    """Appends a generated token to the log; returns why the generation ends here, if it does.

    What launched steps compute beyond that end is for nothing.
    """
    request = session.request
    assert request is not None
    request.unaccepted -= 1
    session.tokens.append(token_id)
    if token_id in request.submit.stop_token_ids:
        return FinishReason.STOP
    if session.generated >= request.max_tokens:
        return FinishReason.LENGTH
    return None


def _check_tokens(field: str, tokens: list[int], vocab_size: int) -> None:
    if tokens and not (min(tokens) >= 0 and max(tokens) < vocab_size):
        bad = next(token for token in tokens if not 0 <= token < vocab_size)
        raise InvalidRequestError.of_field(
            field, f"token id {bad} is not in the vocabulary of 0 to {vocab_size - 1}"
        )
