"""Configuration that every service shares."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class TelemetryConfig:
    """Where traces and logs go.

    Spans are exported by OTLP if a standard ``OTEL_EXPORTER_OTLP_*ENDPOINT`` variable is set, and
    to `trace_file` if that is; otherwise they are not recorded.

    Attributes:
        trace_file: File to append spans to as OTLP JSON lines; None: no file.
        log_level: Name of a level of the standard library's logging.
    """

    trace_file: Path | None = None
    log_level: str = "INFO"
