"""Recording spans: to an OTLP receiver, to a file of OTLP JSON lines, or both.

The client itself makes spans with the OpenTelemetry API alone and does nothing unless the
application records them. This module is for programs that do record: it needs the OpenTelemetry
SDK (``pip install djinn-serving[loadgen]``), which is imported when a function here is called.

A trace file holds one ``ExportTraceServiceRequest`` per line, in the JSON encoding of the
OpenTelemetry specification. Several processes may write to one file.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

# How long a finished span waits for others before it is written: a live system's trace is
# readable, and no request waits for a disk or a collector.
_FLUSH_INTERVAL_MS = 500.0
_MAX_QUEUED_SPANS = 32_768

_propagator = TraceContextTextMapPropagator()


class TracingConfigError(ValueError):
    """The environment or a path asks for something that cannot be had; one line says what."""


def tracer_provider(
    service_name: str,
    *,
    instance: str | None = None,
    trace_file: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> TracerProvider | None:
    """Returns a provider that records as configured; None if nothing asks for spans.

    Spans are exported by OTLP over gRPC if ``OTEL_EXPORTER_OTLP_ENDPOINT`` or
    ``OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`` is set (the exporter reads all the standard variables),
    unless ``OTEL_TRACES_EXPORTER`` is ``none`` or ``OTEL_SDK_DISABLED`` is ``true``; and they are
    appended to `trace_file` if that is given. Call the provider's `shutdown` at the end: it writes
    what is left.

    Args:
        service_name: The resource's ``service.name``.
        instance: The resource's ``service.instance.id``; None: host and process id.
        trace_file: File to append to.
        environ: Environment variables; None: the process's own.

    Raises:
        TracingConfigError: The file cannot be written, or the environment names a protocol other
            than gRPC.
    """
    variables = os.environ if environ is None else environ
    by_otlp = _otlp_wanted(variables)
    if trace_file is None and not by_otlp:
        return None

    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create(
        {
            "service.name": service_name,
            "service.instance.id": instance or f"{os.uname().nodename}:{os.getpid()}",
            "service.version": _version(),
        }
    )
    # The program calls shutdown itself, so that it can say how long it waits.
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    if trace_file is not None:
        provider.add_span_processor(
            BatchSpanProcessor(
                file_exporter(trace_file),
                max_queue_size=_MAX_QUEUED_SPANS,
                schedule_delay_millis=_FLUSH_INTERVAL_MS,
            )
        )
    if by_otlp:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        provider.add_span_processor(
            BatchSpanProcessor(
                OTLPSpanExporter(),
                max_queue_size=_unless(variables, "OTEL_BSP_MAX_QUEUE_SIZE", _MAX_QUEUED_SPANS),
                schedule_delay_millis=_unless(
                    variables, "OTEL_BSP_SCHEDULE_DELAY", _FLUSH_INTERVAL_MS
                ),
            )
        )
    return provider


def file_exporter(path: Path) -> SpanExporter:
    """Returns an exporter that appends each batch of spans to a file as one line of OTLP JSON.

    Args:
        path: The file; its folder must exist.

    Raises:
        TracingConfigError: The file cannot be opened for writing.
    """
    from djinn_client._otlp_file import OtlpFileExporter

    try:
        return OtlpFileExporter(path)
    except OSError as error:
        raise TracingConfigError(f"trace file {path}: {error.strerror}") from error


def context_from_traceparent(traceparent: str, tracestate: str = "") -> Context:
    """Returns the context that a W3C ``traceparent`` names; an empty one if it names none.

    Args:
        traceparent: The header's value; empty or malformed is no parent.
        tracestate: The companion header's value.
    """
    carrier = {"traceparent": traceparent}
    if tracestate:
        carrier["tracestate"] = tracestate
    # From an empty context: the parent is this one or none, never the caller's current span.
    return _propagator.extract(carrier, context=Context())


def traceparent_of(context: Context | None = None) -> str:
    """Returns a context's W3C ``traceparent``; empty if it holds no span.

    Args:
        context: The context; None: the current one.
    """
    span = trace.get_current_span(context).get_span_context()
    if not span.is_valid:
        return ""
    return f"00-{span.trace_id:032x}-{span.span_id:016x}-{span.trace_flags & 0xFF:02x}"


def _otlp_wanted(variables: Mapping[str, str]) -> bool:
    if variables.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    if variables.get("OTEL_TRACES_EXPORTER", "otlp").strip().lower() == "none":
        return False
    names = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    if not any(variables.get(name) for name in names):
        return False
    for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        protocol = variables.get(name)
        if protocol:
            if protocol != "grpc":
                raise TracingConfigError(f"{name}={protocol}: only grpc is supported")
            break
    return True


def _unless(variables: Mapping[str, str], name: str, value: int | float) -> Any:
    """Returns None, so that the SDK reads the variable itself, if it is set."""
    return None if variables.get(name) else value


def _version() -> str:
    try:
        return importlib.metadata.version("djinn-serving")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
