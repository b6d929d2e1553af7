"""Spans as trace files hold them."""

from __future__ import annotations

from typing import Any

import msgspec

WAKE = "agent.wake"
"""Name of the span from COMPUTE sent to the first token received, on the client's clock."""


class SpanEvent(msgspec.Struct, frozen=True):
    """Something that happened at one moment of a span."""

    name: str
    time_ns: int


class Span(msgspec.Struct, frozen=True):
    """One span.

    Attributes:
        trace_id: 32 hexadecimal digits.
        span_id: 16.
        parent_id: 16, or empty for a root.
        name: What was done.
        service: Who did it.
        start_ns: Unix time.
        end_ns: Unix time.
        attributes: What is known of it.
        events: In order of time.
        error: Its status message, if it failed.
    """

    trace_id: str
    span_id: str
    parent_id: str
    name: str
    service: str
    start_ns: int
    end_ns: int
    attributes: dict[str, Any] = {}
    events: tuple[SpanEvent, ...] = ()
    error: str = ""

    @property
    def duration_ms(self) -> float:
        return (self.end_ns - self.start_ns) * 1e-6
