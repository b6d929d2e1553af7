"""The span exporter behind `djinn_client.tracing.file_exporter`; importing it needs the SDK."""

from __future__ import annotations

import base64
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from google.protobuf import json_format
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

_logger = logging.getLogger(__name__)

# Protobuf's JSON has bytes in base64; OTLP's has these three in hex.
_ID_FIELDS = ("traceId", "spanId", "parentSpanId")


class OtlpFileExporter(SpanExporter):
    """Appends each batch to a file as one line.

    Each line is written by one call at the file's end, so that the lines of several processes do
    not mix.
    """

    def __init__(self, path: Path) -> None:
        """Opens the file.

        Args:
            path: Where to append.

        Raises:
            OSError: It cannot be opened for writing.
        """
        self._path = path
        self._file: int | None = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        if self._file is None:
            return SpanExportResult.FAILURE
        line = otlp_json(spans).encode() + b"\n"
        try:
            written = os.write(self._file, line)
        except OSError as error:
            _logger.warning("%s: %d spans lost: %s", self._path, len(spans), error.strerror)
            return SpanExportResult.FAILURE
        if written < len(line):
            _logger.warning("%s: %d spans lost: no room for the line", self._path, len(spans))
            return SpanExportResult.FAILURE
        return SpanExportResult.SUCCESS

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return True

    def shutdown(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def otlp_json(spans: Sequence[ReadableSpan]) -> str:
    """Returns spans as an ``ExportTraceServiceRequest`` in OTLP's JSON encoding, on one line."""
    request: dict[str, Any] = json_format.MessageToDict(
        encode_spans(spans), use_integers_for_enums=True
    )
    for resource_spans in request.get("resourceSpans", ()):
        for scope_spans in resource_spans.get("scopeSpans", ()):
            for span in scope_spans.get("spans", ()):
                _hex_ids(span)
                for link in span.get("links", ()):
                    _hex_ids(link)
    return json.dumps(request, separators=(",", ":"), ensure_ascii=False)


def _hex_ids(message: dict[str, Any]) -> None:
    for name in _ID_FIELDS:
        if name in message:
            message[name] = base64.b64decode(message[name]).hex()
