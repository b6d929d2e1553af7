"""Times and lengths of time."""

from __future__ import annotations

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp


def to_timestamp(time_s: float) -> Timestamp:
    """Returns seconds since the epoch as a Timestamp."""
    stamp = Timestamp()
    stamp.FromNanoseconds(int(time_s * 1e9))
    return stamp


def to_duration(length_s: float) -> Duration:
    """Returns seconds as a Duration."""
    duration = Duration()
    duration.FromNanoseconds(int(length_s * 1e9))
    return duration


def to_seconds(length: Duration) -> float:
    """Returns a Duration as seconds."""
    return length.seconds + length.nanos / 1e9
