"""Traces and logs of one process; nothing global, a `Telemetry` is passed to who makes spans."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.util.types import AttributeValue

from djinn_client.tracing import (
    TracingConfigError,
    context_from_traceparent,
    traceparent_of,
    tracer_provider,
)
from services.common.config import TelemetryConfig
from services.common.errors import ConfigError
from services.common.logs import setup_logging

__all__ = [
    "Telemetry",
    "context_from_traceparent",
    "record_span",
    "setup",
    "traceparent_of",
]

# How long the last spans may take to reach a collector that does not answer.
_SHUTDOWN_S = 5.0


class Telemetry:
    """Makes tracers, and writes out what they recorded."""

    def __init__(self, provider: trace.TracerProvider | None = None) -> None:
        """Makes one over a provider; None: tracers that record nothing and cost next to nothing."""
        self._provider = provider
        self._tracers: trace.TracerProvider = provider or trace.NoOpTracerProvider()

    @property
    def recording(self) -> bool:
        """Whether spans go anywhere."""
        return self._provider is not None

    def tracer(self, name: str) -> trace.Tracer:
        """Returns a tracer for one module.

        Args:
            name: The module's ``__name__``.
        """
        return self._tracers.get_tracer(name)

    def shutdown(self, timeout_s: float = _SHUTDOWN_S) -> None:
        """Writes what is left and stops recording; blocks, so it is the last thing a process does.

        Args:
            timeout_s: Seconds to wait at most for a collector that does not answer.
        """
        shutdown = getattr(self._provider, "shutdown", None)
        if shutdown is None:
            return
        self._provider = None
        thread = threading.Thread(target=shutdown, name="telemetry-shutdown", daemon=True)
        thread.start()
        thread.join(timeout_s)


def setup(service_name: str, config: TelemetryConfig, instance: str) -> Telemetry:
    """Sets logging up and returns the process's telemetry.

    Args:
        service_name: ``djinn-scheduler`` or ``djinn-worker``: ``service.name`` of all spans.
        config: Where traces and logs go.
        instance: Tells processes of one service apart: ``service.instance.id``.

    Raises:
        ConfigError: The log level, the trace file or the environment asks for what cannot be had.
    """
    setup_logging(config.log_level)
    try:
        provider = tracer_provider(service_name, instance=instance, trace_file=config.trace_file)
    except TracingConfigError as error:
        raise ConfigError(str(error)) from error
    return Telemetry(provider)


def record_span(
    tracer: trace.Tracer,
    name: str,
    parent: Context | None,
    start_ns: int,
    end_ns: int,
    attributes: Mapping[str, AttributeValue] | None = None,
    events: Mapping[str, int] | None = None,
) -> Context:
    """Records a span of something that has happened already.

    Args:
        tracer: Who records it.
        name: The span's name.
        parent: Context of the parent span; None: the current one.
        start_ns: When it began, in wall-clock nanoseconds since the epoch.
        end_ns: When it ended; not before `start_ns` (clocks that disagree are put right).
        attributes: Its attributes.
        events: Names of moments in it, with their times in nanoseconds.

    Returns:
        A context in which the span is current, for children of it.
    """
    span = tracer.start_span(name, context=parent, start_time=start_ns, attributes=attributes)
    for event, time_ns in (events or {}).items():
        span.add_event(event, timestamp=time_ns)
    span.end(max(start_ns, end_ns))
    return trace.set_span_in_context(span, parent)
