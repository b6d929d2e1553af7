"""The worker behind `djinn_client.testing`: as strict as the real one where clients notice."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from djinn.v1 import inference_service_pb2, inference_service_pb2_grpc
from djinn_client import _fake_model
from djinn_client._fake_faults import Context, FaultError, abort, traceparent_of

if TYPE_CHECKING:
    from djinn_client.testing import FakeServer


@dataclass
class WorkerState:
    """What is lost when the fake worker is."""

    logs: dict[str, list[int]] = field(default_factory=dict)
    generating: set[str] = field(default_factory=set)
    generation: dict[str, int] = field(default_factory=dict)


class InferenceServicer(inference_service_pb2_grpc.InferenceServiceServicer):
    """Generation from scripted replies."""

    def __init__(self, server: FakeServer, state: WorkerState) -> None:
        self._server = server
        self._state = state

    async def GetModel(
        self, request: inference_service_pb2.GetModelRequest, context: Context
    ) -> inference_service_pb2.GetModelResponse:
        try:
            self._server.raise_fault("GetModel")
        except FaultError as error:
            await abort(context, error)
        return inference_service_pb2.GetModelResponse(
            model=self._server.model_info, worker_id="fake-worker"
        )

    async def Generate(
        self, request: inference_service_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[inference_service_pb2.GenerateResponse]:
        try:
            self._server.record_generate(request, traceparent_of(context))
            fault = self._server.take_fault("Generate")
            if fault is not None and fault.after_tokens is None:
                raise fault.error
            log, appended = self._take_in(request)
            self._state.generating.add(request.session_id)
            finished = None
            try:
                yield self._started(request.session_id, log, appended)
                produced = 0
                async for message in self._tokens(request, log):
                    if fault is not None and produced == fault.after_tokens:
                        raise fault.error
                    produced += len(message.delta.token_ids)
                    if message.HasField("finished"):
                        finished = message
                        break
                    yield message
            finally:
                self._state.generating.discard(request.session_id)
                self._server.notify()
            # Whoever hears of the end may send the session's next request at once.
            assert finished is not None
            yield finished
        except FaultError as error:
            await abort(context, error)

    def _take_in(
        self, request: inference_service_pb2.GenerateRequest
    ) -> tuple[list[int], list[int]]:
        appended = _appended_ids(request)
        _check(request)
        session_id = request.session_id
        if session_id in self._state.generating:
            raise FaultError("SESSION_BUSY", f"session {session_id!r} is generating")
        log = self._state.logs.get(session_id)
        if log is None:
            if not request.session_token:
                raise FaultError("SESSION_UNKNOWN", f"no session {session_id!r}")
            log = self._state.logs[session_id] = []
        if request.HasField("full_context"):
            log[:] = request.full_context.ids
        elif request.HasField("expected_context_length"):
            expected = request.expected_context_length
            if expected != len(log):
                raise FaultError(
                    "CONTEXT_MISMATCH", f"context has {len(log)} tokens, not {expected}"
                )
        if not log and not appended:
            raise FaultError("INVALID_REQUEST", "append: empty prompt", {"field": "append"})
        limit = self._server.model_info.max_context_length
        most = request.max_tokens if request.HasField("max_tokens") else 1
        if len(log) + len(appended) + most > limit:
            raise FaultError(
                "CONTEXT_TOO_LONG",
                f"context of {len(log) + len(appended) + most} tokens is over {limit}",
                {"limit": str(limit)},
            )
        log.extend(appended)
        return log, appended

    def _started(
        self, session_id: str, log: list[int], appended: list[int]
    ) -> inference_service_pb2.GenerateResponse:
        generation = self._state.generation.get(session_id, 0) + 1
        self._state.generation[session_id] = generation
        return inference_service_pb2.GenerateResponse(
            started=inference_service_pb2.GenerateStarted(
                appended_token_ids=appended, context_length=len(log), generation=generation
            )
        )

    async def _tokens(
        self, request: inference_service_pb2.GenerateRequest, log: list[int]
    ) -> AsyncIterator[inference_service_pb2.GenerateResponse]:
        prompt_tokens = len(log)
        room = self._server.model_info.max_context_length - prompt_tokens
        most = min(room, request.max_tokens) if request.HasField("max_tokens") else room
        stops = set(request.stop_token_ids) | (set() if request.ignore_eos else {_fake_model.EOS})
        text = _fake_model.TextStream(request.stop_strings)
        reason = inference_service_pb2.FINISH_REASON_LENGTH
        for count in range(most):
            await self._server.pass_gate(count)
            token = self._server.model.next_token(log, ignore_eos=request.ignore_eos)
            log.append(token)
            self._server.generated_tokens += 1
            delta = inference_service_pb2.GenerateDelta(token_ids=[token], text=text.push(token))
            _add_diagnostics(delta, request, token)
            if token in stops or text.stop_string:
                reason = inference_service_pb2.FINISH_REASON_STOP
            if reason == inference_service_pb2.FINISH_REASON_STOP or count == most - 1:
                delta.text += "" if text.stop_string else text.flush()
            yield inference_service_pb2.GenerateResponse(delta=delta)
            if reason == inference_service_pb2.FINISH_REASON_STOP:
                break
            await asyncio.sleep(0)
        yield inference_service_pb2.GenerateResponse(
            finished=inference_service_pb2.GenerateFinished(
                reason=reason,
                usage=inference_service_pb2.Usage(
                    prompt_tokens=prompt_tokens,
                    prefilled_tokens=prompt_tokens,
                    completion_tokens=len(log) - prompt_tokens,
                ),
                context_length=len(log),
                generation=self._state.generation[request.session_id],
                stop_string=text.stop_string,
            )
        )


def _appended_ids(request: inference_service_pb2.GenerateRequest) -> list[int]:
    kind = request.WhichOneof("append")
    if kind == "append_text":
        return _fake_model.encode(request.append_text)
    if kind == "append_chat":
        turns = ((turn.role, turn.content) for turn in request.append_chat.turns)
        return _fake_model.encode(_fake_model.render(turns))
    ids = list(request.append_token_ids.ids) if kind == "append_token_ids" else []
    for index, token in enumerate(ids):
        if not 0 <= token < _fake_model.VOCAB_SIZE:
            raise FaultError(
                "INVALID_REQUEST",
                f"append_token_ids: [{index}] is {token}, not 0 to {_fake_model.VOCAB_SIZE - 1}",
                {"field": "append_token_ids"},
            )
    return ids


def _check(request: inference_service_pb2.GenerateRequest) -> None:
    if request.HasField("max_tokens") and request.max_tokens < 1:
        message = f"max_tokens: {request.max_tokens}: must be at least 1"
        raise FaultError("INVALID_REQUEST", message, {"field": "max_tokens"})
    temperature = request.sampling.temperature
    if math.isnan(temperature) or not 0 <= temperature <= 100:
        message = f"sampling.temperature: {temperature}: must be 0 to 100"
        raise FaultError("INVALID_REQUEST", message, {"field": "sampling.temperature"})


def _add_diagnostics(
    delta: inference_service_pb2.GenerateDelta,
    request: inference_service_pb2.GenerateRequest,
    token: int,
) -> None:
    if request.HasField("logprobs"):
        certain = inference_service_pb2.TokenLogprob(token_id=token, logprob=0.0)
        top = [certain] if request.logprobs else []
        delta.logprobs.add(chosen=certain, top=top)
    if request.return_logits:
        delta.logits.append(bytes(4 * _fake_model.VOCAB_SIZE))
