"""From the keyword arguments of `generate` to a request."""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Mapping

from google.protobuf.message import Message

from djinn.v1 import inference_service_pb2
from djinn_client import _convert
from djinn_client._errors import InvalidRequestError
from djinn_client._types import GenerateOptions, Prompt


def request_of(
    session_id: str, prompt: Prompt | None, options: GenerateOptions
) -> inference_service_pb2.GenerateRequest:
    """Returns the request, but for the context and the session's token.

    Only what cannot be sent at all is refused here; ranges are the worker's to check.

    Raises:
        InvalidRequestError: A value has the wrong type or does not fit its field.
        TypeError: There is an option by no known name.
    """
    unknown = options.keys() - GenerateOptions.__annotations__.keys()
    if unknown:
        raise TypeError(
            f"generate() got unexpected keyword arguments: {', '.join(sorted(unknown))}"
        )
    request = inference_service_pb2.GenerateRequest(session_id=session_id)
    _convert.set_append(request, prompt)
    _set(request, "request_id", options.get("request_id") or uuid.uuid4().hex)
    for name in ("temperature", "top_k", "top_p", "seed"):
        _set(request.sampling, name, options.get(name))
    if request.sampling.temperature != 0 and not request.sampling.HasField("seed"):
        # Drawn here, so that a worker that takes over chooses the same tokens.
        request.sampling.seed = secrets.randbits(64)
    for name in ("max_tokens", "ignore_eos", "logprobs", "return_logits"):
        _set(request, name, options.get(name))
    stop = options.get("stop")
    if stop is not None:
        _extend(request, "stop_strings", (stop,) if isinstance(stop, str) else stop)
    if "" in request.stop_strings:
        raise InvalidRequestError.of_field("stop", "an empty string would stop everywhere")
    _extend(request, "stop_token_ids", options.get("stop_token_ids") or ())
    return request


def _set(message: Message, field: str, value: object) -> None:
    if value is None:
        return
    try:
        setattr(message, field, value)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError.of_field(field, f"{value!r:.64}: {error}") from None


def _extend(message: Message, field: str, values: object) -> None:
    try:
        getattr(message, field).extend(values)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError.of_field(field, f"{values!r:.64}: {error}") from None


def span_attributes_of(
    request: inference_service_pb2.GenerateRequest,
) -> Mapping[str, str | int | float]:
    """Returns the attributes of a generation's span, by the GenAI conventions' names."""
    sampling = request.sampling
    attributes: dict[str, str | int | float] = {
        "gen_ai.operation.name": "chat" if request.HasField("append_chat") else "text_completion",
        "gen_ai.conversation.id": request.session_id,
        "djinn.request.id": request.request_id,
    }
    if request.HasField("max_tokens"):
        attributes["gen_ai.request.max_tokens"] = request.max_tokens
    if sampling.HasField("temperature"):
        attributes["gen_ai.request.temperature"] = sampling.temperature
    if sampling.HasField("top_k"):
        attributes["gen_ai.request.top_k"] = sampling.top_k
    if sampling.HasField("top_p"):
        attributes["gen_ai.request.top_p"] = sampling.top_p
    return attributes
