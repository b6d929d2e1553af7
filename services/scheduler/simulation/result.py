"""A simulation's raw records and description, in the form of a real run's folder.

The records are those of `djinn-loadgen`, whose report reads them; neither imports the other, so the
form is written down on both sides and a test compares them. Times are virtual seconds since the
run's start.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BufferedWriter
from pathlib import Path
from typing import Any

import msgspec

from services.common.errors import ConfigError

REQUESTS_FILE = "requests.jsonl"
RUN_FILE = "run.json"
_FLUSH_RECORDS = 2000


class Failure(msgspec.Struct, frozen=True):
    """Why something failed: a stable name and one line."""

    reason: str
    message: str


class KvFound(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where a request found the KV it needed."""

    held_blocks: int = 0
    resident_blocks: int = 0
    loaded_blocks: int = 0
    loaded_bytes: int = 0
    recomputed_tokens: int = 0
    load_s: float = 0.0


class AgentRecord(msgspec.Struct, frozen=True, tag="agent", tag_field="event", omit_defaults=True):
    """An agent's whole life."""

    agent: int
    name: str
    scheduled_s: float
    open_sent_s: float
    done_s: float
    session_id: str = ""
    opened_s: float | None = None
    closed_s: float | None = None
    refusals: int = 0
    failure: Failure | None = None


class SignalRecord(
    msgspec.Struct, frozen=True, tag="signal", tag_field="event", omit_defaults=True
):
    """One phase signal."""

    agent: int
    step: int
    phase: str
    sent_s: float
    answered_s: float | None = None


class ToolRecord(msgspec.Struct, frozen=True, tag="tool", tag_field="event"):
    """One tool call."""

    agent: int
    step: int
    name: str
    start_s: float
    due_s: float
    end_s: float


class RequestRecord(
    msgspec.Struct, frozen=True, tag="request", tag_field="event", omit_defaults=True, kw_only=True
):
    """One generation."""

    agent: int
    step: int
    scheduled_s: float
    sent_s: float
    end_s: float
    compute_s: float | None = None
    first_token_s: float | None = None
    appended_tokens: int = 0
    output_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    prefilled_tokens: int = 0
    deltas: Sequence[tuple[float, int]] = ()
    queue_s: float | None = None
    finish_reason: str = ""
    kv: KvFound | None = None


class StatsRecord(msgspec.Struct, frozen=True, tag="stats", tag_field="event"):
    """The workers' counters and pools at one moment."""

    time_s: float
    stats: dict[str, float]


Record = AgentRecord | SignalRecord | ToolRecord | RequestRecord | StatsRecord


class RunFolder:
    """Writes one simulation's files.

    Args:
        folder: Made if need be.

    Raises:
        ConfigError: It cannot be made or written, or holds a run already.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._encoder = msgspec.json.Encoder()
        self._records: list[Record] = []
        path = folder / REQUESTS_FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file: BufferedWriter = path.open("xb")
        except FileExistsError:
            raise ConfigError(f"--out {folder}: holds a run already") from None
        except OSError as error:
            raise ConfigError(f"--out {folder}: {error.strerror}") from None

    def add(self, record: Record) -> None:
        """Takes a record."""
        self._records.append(record)
        if len(self._records) >= _FLUSH_RECORDS:
            self._flush()

    def finish(self, description: dict[str, Any]) -> None:
        """Writes what is left, and what the run was."""
        self._flush()
        self._file.close()
        text = msgspec.json.format(self._encoder.encode(description), indent=2)
        (self.folder / RUN_FILE).write_bytes(text + b"\n")

    def _flush(self) -> None:
        self._file.write(self._encoder.encode_lines(self._records))
        self._records.clear()
