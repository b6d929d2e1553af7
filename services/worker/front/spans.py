"""Spans of what the engine did, made from the times that it reports.

The engine process records none itself: it stays free of telemetry, and its clock is this machine's.
"""

from __future__ import annotations

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.util.types import AttributeValue

from services.common.telemetry import Telemetry, context_from_traceparent, record_span
from services.worker import messages
from services.worker.front.generation import Generation

_COMMAND_SPANS: dict[type[messages.Action], str] = {
    messages.Evict: "kv.evict",
    messages.Restore: "kv.restore",
    messages.Prefetch: "kv.prefetch",
    messages.Drop: "kv.drop",
}


class SpanRecorder:
    """Records `generate` with its parts, and the commands that move KV."""

    def __init__(self, telemetry: Telemetry, model: str) -> None:
        """Records for a worker that serves `model`."""
        self._recording = telemetry.recording
        self._tracer = telemetry.tracer(__name__)
        self._model = model

    def current(self) -> Context | None:
        """Returns the context that a call's spans shall be under; None if none are recorded."""
        return trace.set_span_in_context(trace.get_current_span()) if self._recording else None

    def generation(self, generation: Generation, parent: Context | None) -> None:
        """Records a request that is over: `generate` > `queue`, `kv.restore`, `prefill`."""
        if not self._recording:
            return
        times, started = generation.times, generation.started
        events = {
            name: time_ns
            for name, time_ns in (
                ("first_token", times.first_token_ns),
                ("first_token_sent", times.first_sent_ns),
            )
            if time_ns
        }
        context = record_span(
            self._tracer,
            "generate",
            parent,
            times.received_ns,
            times.ended_ns,
            self._generate_attributes(generation),
            events,
        )
        if started is None:
            return
        record_span(self._tracer, "queue", context, times.received_ns, started.started_ns)
        kv = started.kv
        if kv.loaded_blocks and kv.load_start_ns >= times.received_ns:
            # Copies that an earlier command began have their span under that command.
            record_span(
                self._tracer,
                "kv.restore",
                context,
                kv.load_start_ns,
                kv.load_end_ns,
                _copy_attributes(
                    generation.submit.session_id,
                    kv.loaded_bytes,
                    kv.loaded_blocks,
                    kv.resident_blocks,
                    kv.load_end_ns - kv.load_start_ns,
                ),
            )
        if times.first_token_ns:
            record_span(
                self._tracer,
                "prefill",
                context,
                started.started_ns,
                times.collected_ns or times.first_token_ns,
                {
                    "djinn.prompt_tokens": started.context_length,
                    "djinn.cached_tokens": started.cached_tokens,
                },
            )

    def command(
        self, command: messages.Command, traceparent: str, done: messages.CommandDone
    ) -> None:
        """Records a command that has ended, under what caused it."""
        name = _COMMAND_SPANS.get(type(command.action))
        if not self._recording or name is None:
            return
        attributes = _copy_attributes(
            command.session_id,
            done.moved_bytes,
            done.moved_blocks,
            done.resident_blocks,
            done.copy_end_ns - done.copy_start_ns,
        )
        attributes["djinn.command_id"] = command.command_id
        if done.error is not None:
            attributes["error.type"] = done.error.reason
        record_span(
            self._tracer,
            name,
            context_from_traceparent(traceparent),
            command.received_ns,
            done.done_ns,
            attributes,
            {"taken": done.taken_ns} if done.taken_ns else None,
        )

    def _generate_attributes(self, generation: Generation) -> dict[str, AttributeValue]:
        submit, started, end = generation.submit, generation.started, generation.end
        attributes: dict[str, AttributeValue] = {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.request.model": self._model,
            "gen_ai.conversation.id": submit.session_id,
            "gen_ai.usage.output_tokens": generation.token_count,
            "djinn.request.id": submit.request_id,
        }
        if submit.max_tokens is not None:
            attributes["gen_ai.request.max_tokens"] = submit.max_tokens
        if started is not None:
            attributes["gen_ai.usage.input_tokens"] = started.context_length
            attributes["djinn.cached_tokens"] = started.cached_tokens
            attributes["djinn.kv.held_blocks"] = started.kv.held_blocks
            attributes["djinn.kv.resident_blocks"] = started.kv.resident_blocks
            attributes["djinn.kv.loaded_blocks"] = started.kv.loaded_blocks
            attributes["djinn.kv.loaded_bytes"] = started.kv.loaded_bytes
            attributes["djinn.kv.recomputed_tokens"] = started.kv.recomputed_tokens
        if end is not None:
            attributes["gen_ai.response.finish_reasons"] = (end.reason.value,)
            attributes["djinn.prefilled_tokens"] = end.prefilled_tokens
        if generation.error is not None:
            attributes["error.type"] = generation.error.reason
        return attributes


def _copy_attributes(
    session_id: str, moved_bytes: int, blocks: int, resident: int, copy_ns: int
) -> dict[str, AttributeValue]:
    attributes: dict[str, AttributeValue] = {
        "gen_ai.conversation.id": session_id,
        "djinn.kv.bytes": moved_bytes,
        "djinn.kv.blocks": blocks,
        "djinn.kv.resident_blocks": resident,
    }
    if moved_bytes and copy_ns > 0:
        attributes["djinn.kv.copy_seconds"] = copy_ns / 1e9
        attributes["djinn.kv.bytes_per_second"] = moved_bytes / copy_ns * 1e9
    return attributes
