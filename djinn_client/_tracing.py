"""Spans of the client, by the OpenTelemetry API alone: without an SDK they cost next to nothing.

One trace per wake: ``agent.wake`` from COMPUTE sent to the first token received, with
``signal_phase`` and ``generate`` below it. The context travels to the servers as a W3C
``traceparent``, in the metadata of a call or in a field of a message on a stream.
"""

from __future__ import annotations

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from djinn_client._errors import DjinnError

_propagator = TraceContextTextMapPropagator()


def tracer_of(provider: trace.TracerProvider | None) -> trace.Tracer:
    """Returns the client's tracer from `provider`, or from the global one if None."""
    return trace.get_tracer("djinn_client", tracer_provider=provider)


def headers_of(span: trace.Span | None) -> dict[str, str]:
    """Returns the propagation headers of `span`, or of the current context if None."""
    carrier: dict[str, str] = {}
    context = None if span is None else trace.set_span_in_context(span)
    _propagator.inject(carrier, context)
    return carrier


def traceparent_of(span: trace.Span) -> str:
    """Returns the ``traceparent`` of `span`; empty if it is not recorded."""
    return headers_of(span).get("traceparent", "")


def child_context(parent: trace.Span | None) -> otel_context.Context | None:
    """Returns the context for a child of `parent`; None, the current context, without one."""
    return None if parent is None else trace.set_span_in_context(parent)


def fail(span: trace.Span, error: DjinnError) -> None:
    """Marks a span as failed by `error`; it is not ended."""
    span.set_attribute("error.type", error.reason)
    span.set_status(trace.Status(trace.StatusCode.ERROR, error.message))
