"""Raw events of a run, one JSON object per line, and the run's own description.

Times are seconds since the run's start, on the monotonic clock that all client processes of a
machine share. `RunInfo.start_unix_ns` says when that was.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from loadgen.config import RunConfig
from loadgen.errors import RunFileError

REQUESTS_FILE = "requests.jsonl"
RUN_FILE = "run.json"
REPORT_FILE = "report.json"
SCHEMA_VERSION = 1


class Failure(msgspec.Struct, frozen=True):
    """Why something failed.

    Attributes:
        reason: Stable upper-case name, the server's where it gave one.
        message: One line.
    """

    reason: str
    message: str


class KvFound(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where a request found the KV it needed, as the server says.

    Attributes:
        held_blocks: Blocks held on the device all along.
        resident_blocks: Blocks of an evicted session that were still on the device.
        loaded_blocks: Blocks copied from the host.
        loaded_bytes: Bytes of those copies.
        recomputed_tokens: Tokens whose KV was computed again.
        prefix_hit_tokens: Prompt tokens found in the shared prefix index.
        load_s: From the first copy's start to the last one's end.
    """

    held_blocks: int = 0
    resident_blocks: int = 0
    loaded_blocks: int = 0
    loaded_bytes: int = 0
    recomputed_tokens: int = 0
    prefix_hit_tokens: int = 0
    load_s: float = 0.0


class AgentRecord(msgspec.Struct, frozen=True, tag="agent", tag_field="event", omit_defaults=True):
    """An agent's whole life; written when it ends.

    Attributes:
        agent: Its index.
        name: Its name.
        scheduled_s: When it was to arrive.
        session_id: Its session; empty: it could not be opened.
        open_sent_s: When OpenSession was sent.
        opened_s: When the answer came; None: it failed.
        done_s: When its last request had ended, or it failed.
        closed_s: When CloseSession had been answered; None: it was not.
        refusals: How often it was told to come again later before it was admitted.
        failure: Why it did not get to its end; None: it did.
    """

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
    """One phase signal.

    Attributes:
        agent: The agent's index.
        step: The request that the signal comes before.
        phase: ``"IO_WAIT"`` or ``"COMPUTE"``.
        sent_s: When it was sent.
        answered_s: When the answer came; None: not awaited, or it failed.
        failure: Why it failed.
    """

    agent: int
    step: int
    phase: str
    sent_s: float
    answered_s: float | None = None
    failure: Failure | None = None


class ToolRecord(msgspec.Struct, frozen=True, tag="tool", tag_field="event"):
    """One tool call.

    Attributes:
        agent: The agent's index.
        step: The request that waits for it.
        name: The tool.
        start_s: When it began.
        due_s: When it was to return.
        end_s: When it did.
    """

    agent: int
    step: int
    name: str
    start_s: float
    due_s: float
    end_s: float


class RequestRecord(
    msgspec.Struct, frozen=True, tag="request", tag_field="event", omit_defaults=True, kw_only=True
):
    """One generation.

    Attributes:
        agent: The agent's index.
        step: 0 for Reason; each Reflect counts on.
        scheduled_s: When it was to begin: the agent's arrival, or its tool's return.
        compute_s: When the COMPUTE signal was sent that it follows; None: there was none.
        sent_s: When Generate was sent.
        first_token_s: When the first token id was received; None: none was.
        end_s: When the last message was received, or the request failed.
        appended_tokens: Tokens that the prompt became.
        output_tokens: Token ids received.
        prompt_tokens: Context and prompt together, as the server says.
        cached_tokens: Of these, tokens whose KV was found.
        prefilled_tokens: Tokens that were prefilled.
        deltas: Time and number of token ids of each message that had any.
        token_ids: The ids themselves; empty unless they were to be recorded.
        queue_s: Time the server had it wait before its first step.
        finish_reason: ``"stop"``, ``"length"``, or empty if it failed.
        kv: Where its KV was found; None: the server did not say.
        resends: How often it was sent again, because a worker or its KV was lost.
        prompt: What was said, where it is text.
        output: What was answered, where it is text.
        failure: Why it failed; None: it did not.
    """

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
    deltas: list[tuple[float, int]] = []
    token_ids: list[int] = []
    queue_s: float | None = None
    finish_reason: str = ""
    kv: KvFound | None = None
    resends: int = 0
    prompt: str = ""
    output: str = ""
    failure: Failure | None = None


class StatsRecord(msgspec.Struct, frozen=True, tag="stats", tag_field="event"):
    """The server's counters and pools at one moment.

    Attributes:
        time_s: When they were asked for.
        stats: As the target gives them.
    """

    time_s: float
    stats: dict[str, float]


Record = AgentRecord | SignalRecord | ToolRecord | RequestRecord | StatsRecord


class LoopLag(msgspec.Struct, frozen=True):
    """How late one client process's event loop ran.

    Attributes:
        process: The process's number.
        samples: How often it was measured.
        p50_ms: Half of the samples were at most this late.
        p99_ms: 99 of 100 samples were at most this late.
        max_ms: The latest.
        preemptions: How often the kernel had the loop's thread make room for another meanwhile.
    """

    process: int
    samples: int
    p50_ms: float
    p99_ms: float
    max_ms: float
    preemptions: int = 0


class RunInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a run was: ``run.json``.

    Attributes:
        schema_version: Of this file and of the records.
        name: The experiment's name.
        config: The workload in full, defaults filled in.
        config_file: Where it was read from.
        overrides: Values given on the command line.
        target: ``"djinn"``, or whatever else was driven.
        server: Where.
        model: What the server says it serves.
        policy: The scheduler's policy; empty: unknown.
        tenant: Whose the agents' sessions were, and so with whom they shared KV.
        labels: What a reader must know before comparing, such as ``"oracle"``.
        start_unix_ns: Wall-clock time of the run's start.
        clock: What the records' times were taken from.
        duration_s: From the start to the end of the last agent's last request.
        processes: Client processes.
        loop_lag: Each process's event loop.
        lost_processes: Client processes that ended before their work did.
        interrupted: True: somebody stopped the run before its end.
        stats_before: The server's counters before the first agent.
        stats_after: The same after the last.
        stats_settled: Whether `stats_after` is known to have all that the run did.
        versions: Of this package and what it runs on.
        machine: The client's machine.
        git_commit: Of the checkout it ran from; empty: not a checkout.
    """

    schema_version: int = SCHEMA_VERSION
    name: str
    config: RunConfig
    config_file: str
    overrides: dict[str, str] = {}
    target: str
    server: str
    model: dict[str, Any]
    policy: str = ""
    tenant: str = ""
    labels: list[str] = []
    start_unix_ns: int
    clock: str = "CLOCK_MONOTONIC"
    duration_s: float = 0.0
    processes: int = 1
    loop_lag: list[LoopLag] = []
    lost_processes: int = 0
    interrupted: bool = False
    stats_before: dict[str, float] = {}
    stats_after: dict[str, float] = {}
    stats_settled: bool = True
    versions: dict[str, str] = {}
    machine: dict[str, Any] = {}
    git_commit: str = ""


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Record)


def encode(records: Iterable[Record]) -> bytes:
    """Returns records as JSON lines."""
    return _encoder.encode_lines(records)


def decode_lines(data: bytes, origin: str) -> Iterator[Record]:
    """Reads JSON lines.

    Args:
        data: The lines.
        origin: What to call them in errors.

    Yields:
        One record per line that is not empty.

    Raises:
        RunFileError: A line is not a record; the message has its number.
    """
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            yield _decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise RunFileError(f"{origin}:{number}: not a record: {error}") from None


def read_requests(run: Path) -> list[Record]:
    """Reads a run's raw events.

    Raises:
        RunFileError: The folder has no such file, or a line of it is broken.
    """
    path = run / REQUESTS_FILE
    return list(decode_lines(_read(path), str(path)))


def read_run(run: Path) -> RunInfo:
    """Reads a run's description.

    Raises:
        RunFileError: The folder has no such file, or it is broken.
    """
    path = run / RUN_FILE
    try:
        return msgspec.json.decode(_read(path), type=RunInfo)
    except msgspec.DecodeError as error:
        raise RunFileError(f"{path}: not a run: {error}") from None


def write_run(run: Path, info: RunInfo) -> None:
    """Writes a run's description."""
    text = msgspec.json.format(msgspec.json.encode(info), indent=2)
    (run / RUN_FILE).write_bytes(text + b"\n")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RunFileError(f"{path}: {error.strerror}") from None
