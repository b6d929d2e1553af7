"""InferenceService's messages: requests are checked here, each problem naming its field."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Sequence

from google.protobuf.duration_pb2 import Duration

from djinn.v1 import inference_service_pb2 as pb
from djinn.v1 import types_pb2
from services.common.errors import InvalidRequestError
from services.common.session_token import SessionToken, check_session_id
from services.worker import messages
from services.worker.front.chat import Turn
from services.worker.front.generation import Begun, Delta, End, Event
from services.worker.front.generator import GenerateInput, ServedModel

MAX_REQUEST_ID_CHARS = 128
MAX_TEMPERATURE = 100.0
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 256
MAX_STOP_TOKEN_IDS = 64
MAX_LOGPROBS = 20
MAX_INT64 = 2**63 - 1

MAX_DELTA_BYTES = 1 << 20
"""About how large one delta with logits may be; gRPC's default limit for a message is 4 MiB."""

_bad = InvalidRequestError.of_field


def generate_input(request: pb.GenerateRequest, model: ServedModel) -> GenerateInput:
    """Returns a request as plain data, every default filled in.

    Args:
        request: As received.
        model: Whose vocabulary token ids are checked against.

    Raises:
        InvalidRequestError: A field is wrong by itself.
    """
    session_id = check_session_id(request.session_id)
    token = SessionToken(session_id)
    if request.session_token:
        token = SessionToken.decode(request.session_token)
        if token.session_id != session_id:
            raise _bad("session_token", f"is of session {token.session_id!r}, not {session_id!r}")
    if len(request.request_id) > MAX_REQUEST_ID_CHARS:
        raise _bad(
            "request_id",
            f"{len(request.request_id)} characters, at most {MAX_REQUEST_ID_CHARS} are allowed",
        )
    vocab_size = model.ready.vocab_size
    full_context = None
    if request.HasField("full_context"):
        full_context = _ids("full_context", request.full_context.ids, vocab_size)
    expected = None
    if request.HasField("expected_context_length"):
        expected = request.expected_context_length
        if expected < 0:
            raise _bad("expected_context_length", f"{expected} is negative")
    max_tokens = None
    if request.HasField("max_tokens"):
        max_tokens = request.max_tokens
        if max_tokens < 1:
            raise _bad("max_tokens", f"{max_tokens}, at least 1 is needed")
    logprobs = None
    if request.HasField("logprobs"):
        logprobs = request.logprobs
        if not 0 <= logprobs <= MAX_LOGPROBS:
            raise _bad("logprobs", f"{logprobs} is not from 0 to {MAX_LOGPROBS}")
        logprobs = min(logprobs, vocab_size)
    return GenerateInput(
        session_id=session_id,
        create=bool(request.session_token),
        cache_salt=token.cache_salt,
        priority=token.priority,
        scheduler_record=request.session_token,
        request_id=request.request_id or secrets.token_hex(8),
        full_context=full_context,
        expected_context_length=expected,
        append=_append(request, vocab_size),
        sampling=_sampling(request.sampling),
        max_tokens=max_tokens,
        stop_strings=_stop_strings(request.stop_strings),
        stop_token_ids=_stop_token_ids(request.stop_token_ids, vocab_size),
        ignore_eos=request.ignore_eos,
        logprobs=logprobs,
        return_logits=request.return_logits,
    )


def _append(
    request: pb.GenerateRequest, vocab_size: int
) -> list[int] | str | tuple[Turn, ...] | None:
    match request.WhichOneof("append"):
        case "append_token_ids":
            return _ids("append_token_ids", request.append_token_ids.ids, vocab_size)
        case "append_text":
            if not request.append_text:
                raise _bad("append_text", "empty prompt; leave it unset to append nothing")
            return request.append_text
        case "append_chat":
            turns = tuple(Turn(turn.role, turn.content) for turn in request.append_chat.turns)
            if not turns:
                raise _bad("append_chat.turns", "empty prompt; at least one turn is needed")
            for index, turn in enumerate(turns):
                if not turn.role:
                    raise _bad(f"append_chat.turns[{index}].role", "is empty")
                if not turn.content:
                    raise _bad(f"append_chat.turns[{index}].content", "is empty")
            return turns
        case _:
            return None


def _ids(field: str, ids: Sequence[int], vocab_size: int) -> list[int]:
    found = list(ids)
    if found and not (min(found) >= 0 and max(found) < vocab_size):
        index = next(i for i, token_id in enumerate(found) if not 0 <= token_id < vocab_size)
        raise _bad(
            field,
            f"token id {found[index]} at index {index} is not in the vocabulary "
            f"of {vocab_size} (0 to {vocab_size - 1})",
        )
    return found


def _sampling(sampling: pb.SamplingParams) -> messages.SamplingParams:
    temperature, top_k, top_p = sampling.temperature, 0, 1.0
    if not (math.isfinite(temperature) and 0 <= temperature <= MAX_TEMPERATURE):
        raise _bad("sampling.temperature", f"{temperature:g} is not from 0 to {MAX_TEMPERATURE:g}")
    if sampling.HasField("top_k"):
        top_k = sampling.top_k
        if top_k < 1:
            raise _bad("sampling.top_k", f"{top_k}, at least 1 is needed; unset means all tokens")
    if sampling.HasField("top_p"):
        top_p = sampling.top_p
        if not 0 < top_p <= 1:
            raise _bad("sampling.top_p", f"{top_p:g} is not above 0 and at most 1")
    seed = sampling.seed if sampling.HasField("seed") else secrets.randbits(64)
    return messages.SamplingParams(temperature, top_k, top_p, seed)


def _stop_strings(stops: Sequence[str]) -> tuple[str, ...]:
    if len(stops) > MAX_STOP_STRINGS:
        raise _bad("stop_strings", f"{len(stops)} of them, at most {MAX_STOP_STRINGS} are allowed")
    for index, stop in enumerate(stops):
        if not 1 <= len(stop) <= MAX_STOP_STRING_CHARS:
            raise _bad(
                f"stop_strings[{index}]",
                f"{len(stop)} characters, 1 to {MAX_STOP_STRING_CHARS} are allowed",
            )
    return tuple(stops)


def _stop_token_ids(ids: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    if len(ids) > MAX_STOP_TOKEN_IDS:
        raise _bad(
            "stop_token_ids", f"{len(ids)} of them, at most {MAX_STOP_TOKEN_IDS} are allowed"
        )
    return tuple(_ids("stop_token_ids", ids, vocab_size))


# --- answers -------------------------------------------------------------------------------------


def generate_responses(event: Event) -> Iterable[pb.GenerateResponse]:
    """Returns an event as messages: one, but for a delta with logits, which may need several."""
    match event:
        case Delta():
            return map(_delta_response, _parts(event))
        case Begun():
            return (pb.GenerateResponse(started=_started(event)),)
        case End():
            return (pb.GenerateResponse(finished=_finished(event)),)


def _parts(delta: Delta) -> Iterable[Delta]:
    if not delta.logits:
        yield delta
        return
    step = max(1, MAX_DELTA_BYTES // max(1, len(delta.logits[0])))
    for start in range(0, len(delta.token_ids), step):
        end = start + step
        yield Delta(
            delta.token_ids[start:end],
            delta.text if end >= len(delta.token_ids) else [],
            delta.logprobs[start:end],
            delta.logits[start:end],
        )


def _delta_response(delta: Delta) -> pb.GenerateResponse:
    text = "".join(delta.text)
    if not (delta.logprobs or delta.logits):  # the hot path
        return pb.GenerateResponse(delta=pb.GenerateDelta(token_ids=delta.token_ids, text=text))
    return pb.GenerateResponse(
        delta=pb.GenerateDelta(
            token_ids=delta.token_ids,
            text=text,
            logprobs=[
                pb.PositionLogprobs(
                    chosen=_token_logprob(each.chosen), top=map(_token_logprob, each.top)
                )
                for each in delta.logprobs
            ],
            logits=delta.logits,
        )
    )


def _token_logprob(logprob: messages.TokenLogprob) -> pb.TokenLogprob:
    return pb.TokenLogprob(token_id=logprob.token_id, logprob=logprob.logprob)


def _started(begun: Begun) -> pb.GenerateStarted:
    started, kv = begun.started, begun.started.kv
    return pb.GenerateStarted(
        appended_token_ids=begun.appended,
        context_length=started.context_length,
        generation=started.generation,
        kv=pb.KvSource(
            held_blocks=kv.held_blocks,
            resident_blocks=kv.resident_blocks,
            loaded_blocks=kv.loaded_blocks,
            loaded_bytes=kv.loaded_bytes,
            recomputed_tokens=kv.recomputed_tokens,
            load_duration=duration(kv.load_end_ns - kv.load_start_ns),
            prefix_hit_tokens=kv.prefix_hit_tokens,
        ),
        queue_duration=duration(started.started_ns - started.queued_ns),
    )


_REASONS = {
    messages.FinishReason.STOP: pb.FINISH_REASON_STOP,
    messages.FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}


def _finished(end: End) -> pb.GenerateFinished:
    return pb.GenerateFinished(
        reason=_REASONS[end.reason],
        usage=pb.Usage(
            prompt_tokens=end.prompt_tokens,
            cached_tokens=end.cached_tokens,
            prefilled_tokens=end.prefilled_tokens,
            completion_tokens=end.completion_tokens,
        ),
        context_length=end.context_length,
        generation=end.generation,
        stop_string=end.stop_string,
    )


def model_info(model: ServedModel) -> types_pb2.ModelInfo:
    """Returns what the worker serves as a message."""
    ready = model.ready
    return types_pb2.ModelInfo(
        model=model.name,
        vocab_size=ready.vocab_size,
        max_context_length=ready.max_context_length,
        eos_token_ids=model.eos_token_ids,
        block_size_tokens=ready.block_size_tokens,
        block_bytes=ready.block_bytes,
        dtype=ready.dtype,
        has_tokenizer=model.text is not None,
        has_chat_template=model.chat is not None,
    )


def model_response(model: ServedModel, worker_id: str) -> pb.GetModelResponse:
    """Returns GetModel's answer."""
    return pb.GetModelResponse(model=model_info(model), worker_id=worker_id)


def duration(nanoseconds: int) -> Duration:
    """Returns a length of time as a message; what clocks made negative is zero."""
    message = Duration()
    message.FromNanoseconds(max(0, nanoseconds))
    return message
