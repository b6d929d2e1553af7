"""Plain data between the worker's two processes, front and engine.

Everything the front sends is one of `ToEngine`, everything the engine sends one of `ToFront`;
`encode_*` and `decode_*` turn a batch of them into one frame of msgpack. Nothing here knows
protobuf or torch.

Times named `_ns` are wall-clock nanoseconds since the epoch (`time.time_ns`), fit for spans.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import msgspec

from services.common.errors import ErrorInfo


class Struct(msgspec.Struct, frozen=True, tag=True, array_like=True, omit_defaults=False):
    """Base of all messages: immutable, tagged with its class name, sent as an array."""


# --- what both directions speak of ---------------------------------------------------------------


class SamplingParams(Struct, frozen=True):
    """How tokens are chosen; already validated, every default filled in.

    Attributes:
        temperature: 0 is greedy.
        top_k: Only the k likeliest may be chosen; 0 means all.
        top_p: Only the likeliest that together reach this probability; 1 means all.
        seed: With the token's position it makes the choice repeatable.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


class Residency(Struct, frozen=True):
    """Where a session's KV lies; the fields of `djinn.v1.KvResidency`."""

    total_blocks: int = 0
    device_blocks: int = 0
    host_blocks: int = 0
    missing_tokens: int = 0
    resident: bool = False


class SessionState(Struct, frozen=True):
    """One session as the engine holds it."""

    session_id: str
    generation: int
    context_length: int
    kv: Residency
    generating: bool
    scheduler_record: bytes
    last_generate_ns: int | None


class KvSource(Struct, frozen=True):
    """Where a request's KV was found; the fields of `djinn.v1.KvSource`."""

    held_blocks: int = 0
    resident_blocks: int = 0
    loaded_blocks: int = 0
    loaded_bytes: int = 0
    recomputed_tokens: int = 0
    load_start_ns: int = 0
    load_end_ns: int = 0
    prefix_hit_tokens: int = 0


# --- front to engine -----------------------------------------------------------------------------


class Submit(Struct, frozen=True):
    """Run one Generate.

    Attributes:
        request_id: Unique among the engine's requests; made unique by the front.
        session_id: The session to continue; made if unknown and `create` is set.
        create: The request carried a session token, so the session may be made.
        cache_salt: For a session that is made: who it shares blocks with.
        priority: For a session that is made.
        scheduler_record: For a session that is made.
        full_context: Replaces the context, of which the longest common prefix is kept.
        expected_context_length: The context's length must be this before anything is appended.
        append: Token ids to append.
        max_tokens: Most tokens to generate; None: what the context has room for.
        stop_token_ids: Ids that end the generation, the model's own included if they shall.
        logprobs: How many likeliest tokens to report beside each chosen one; None: no report.
        return_logits: Report the whole logits of each step.
        received_ns: When the request reached the front.
    """

    request_id: str
    session_id: str
    create: bool
    cache_salt: str
    priority: int
    scheduler_record: bytes
    full_context: list[int] | None
    expected_context_length: int | None
    append: list[int]
    sampling: SamplingParams
    max_tokens: int | None
    stop_token_ids: list[int]
    logprobs: int | None
    return_logits: bool
    received_ns: int


class Abort(Struct, frozen=True):
    """The client went away: end the request. Its tokens so far stay in the context."""

    request_id: str


class StopAt(Struct, frozen=True):
    """A stop string appeared: end the request well and cut the context to this length."""

    request_id: str
    session_id: str
    context_length: int


class EvictMode(StrEnum):
    """How thoroughly an eviction lets device blocks go; see `djinn.v1.EvictMode`."""

    LAZY = "lazy"
    RELEASE = "release"
    SCRUB = "scrub"


class Open(Struct, frozen=True):
    """Make the session known."""

    cache_salt: str = ""
    priority: int = 0


class Close(Struct, frozen=True):
    """End the session and forget it."""


class Evict(Struct, frozen=True):
    """Let its device blocks go, keep host copies."""

    mode: EvictMode = EvictMode.LAZY
    expected_wake_ns: int | None = None


class Restore(Struct, frozen=True):
    """Bring its KV to the device because it wakes."""


class Prefetch(Struct, frozen=True):
    """Bring its KV to the device because it soon will wake, using only blocks nobody holds."""


class Drop(Struct, frozen=True):
    """Forget its KV on both sides, keep its tokens."""


class SetHint(Struct, frozen=True):
    """Tell what is expected of it, moving nothing."""

    expected_wake_ns: int | None = None
    priority: int | None = None


Action = Open | Close | Evict | Restore | Prefetch | Drop | SetHint


class Command(Struct, frozen=True):
    """One command of the scheduler's. Ids seen before are answered by the front, not sent again.

    Attributes:
        deadline_ns: After this it need not be begun; on this machine's clock.
    """

    command_id: str
    session_id: str
    action: Action
    expected_generation: int | None = None
    deadline_ns: int | None = None
    scheduler_record: bytes | None = None
    received_ns: int = 0


class Mode(Struct, frozen=True):
    """How the engine serves; the fields of `djinn.v1.WorkerMode`.

    Attributes:
        write_through: Blocks are copied to the host as soon as they are full.
        offload: What is evicted keeps a copy on the host; else it is forgotten, as by `Drop`.
        share_prefixes: Sessions share the blocks of equal prefixes.
    """

    write_through: bool = True
    offload: bool = True
    share_prefixes: bool = True


class SetMode(Struct, frozen=True):
    """Serve like this from now on, as far as the engine's own configuration allows."""

    mode: Mode


class GetSnapshot(Struct, frozen=True):
    """Asks for a `Snapshot` of every session."""

    snapshot_id: int


class Shutdown(Struct, frozen=True):
    """Abort what runs, finish the copies, and end the process with exit code 0."""


ToEngine = Submit | Abort | StopAt | Command | SetMode | GetSnapshot | Shutdown


# --- engine to front -----------------------------------------------------------------------------


class PoolState(Struct, frozen=True):
    """Blocks of one pool by use; the four after `total` add up to it."""

    total: int = 0
    free: int = 0
    used: int = 0
    reclaimable: int = 0
    in_flight: int = 0


class Counters(Struct, frozen=True):
    """What the engine has done since it started; the fields of `djinn.v1.WorkerCounters`."""

    stores: int = 0
    loads: int = 0
    stored_bytes: int = 0
    loaded_bytes: int = 0
    resident_hit_blocks: int = 0
    evictions: int = 0
    restores: int = 0
    prefetches: int = 0
    drops: int = 0
    preemptions: int = 0
    prefilled_tokens: int = 0
    recomputed_tokens: int = 0
    prefix_hit_tokens: int = 0
    generated_tokens: int = 0
    requests_completed: int = 0
    requests_failed: int = 0
    requests_cancelled: int = 0


class Progress(Struct, frozen=True):
    """How far the engine's start has come, for the terminal and the health service."""

    what: str
    fraction: float


class Ready(Struct, frozen=True):
    """The engine can take requests."""

    vocab_size: int
    max_context_length: int
    block_size_tokens: int
    block_bytes: int
    dtype: str
    device_blocks: int
    host_blocks: int
    max_running_sequences: int
    max_step_tokens: int


class Failed(Struct, frozen=True):
    """The engine ends: `ConfigError`'s line if it could not start, else the traceback.

    Attributes:
        is_config: True if the user can mend it; the front then exits with code 2, else 1.
    """

    message: str
    is_config: bool


class TokenLogprob(Struct, frozen=True):
    """One token's natural-log probability."""

    token_id: int
    logprob: float


class PositionLogprobs(Struct, frozen=True):
    """Log-probabilities at one generated position."""

    chosen: TokenLogprob
    top: list[TokenLogprob]


class Started(Struct, frozen=True):
    """A request's first step has begun.

    Attributes:
        context_length: Tokens in the context, the appended ones included.
        cached_tokens: Of these, tokens whose KV was found rather than computed.
        queued_ns: When the engine took the request.
        started_ns: When the first step that works on it was launched.
    """

    request_id: str
    context_length: int
    cached_tokens: int
    generation: int
    kv: KvSource
    queued_ns: int
    started_ns: int


class Tokens(Struct, frozen=True):
    """Tokens a step made for one request; one entry per token in each list that is not empty.

    Attributes:
        collected_ns: When the engine took the step's result from the device.
    """

    request_id: str
    token_ids: list[int]
    logprobs: list[PositionLogprobs]
    logits: list[bytes]
    collected_ns: int = 0


class FinishReason(StrEnum):
    """Why a request ended well."""

    STOP = "stop"
    LENGTH = "length"


class Finished(Struct, frozen=True):
    """A request has ended well, by itself or by `StopAt`."""

    request_id: str
    reason: FinishReason
    prefilled_tokens: int
    completion_tokens: int
    context_length: int
    generation: int


class Rejected(Struct, frozen=True):
    """A request has failed or been cancelled; nothing more will come of it."""

    request_id: str
    error: ErrorInfo


OfRequest = Started | Tokens | Finished | Rejected


class CommandDone(Struct, frozen=True):
    """A command has ended; `error` is None if well.

    Attributes:
        received_ns: When the front received it.
        taken_ns: When the engine took it on; 0: the front refused it.
        done_ns: When it ended.
    """

    command_id: str
    session_id: str
    error: ErrorInfo | None
    generation: int
    kv: Residency
    moved_bytes: int = 0
    moved_blocks: int = 0
    resident_blocks: int = 0
    copy_start_ns: int = 0
    copy_end_ns: int = 0
    received_ns: int = 0
    done_ns: int = 0
    taken_ns: int = 0


class SessionEventKind(StrEnum):
    """What happened to a session without a command."""

    CREATED = "created"
    GENERATE_STARTED = "generate_started"
    GENERATE_FINISHED = "generate_finished"
    EVICTED = "evicted"
    RESTORED = "restored"
    DROPPED = "dropped"


class SessionEvent(Struct, frozen=True):
    """A session has changed on the engine's own account."""

    kind: SessionEventKind
    session: SessionState
    event_ns: int


class Snapshot(Struct, frozen=True):
    """Every session, in answer to `GetSnapshot`."""

    snapshot_id: int
    sessions: list[SessionState]


class Report(Struct, frozen=True):
    """How full and how fast the engine is; sent every `EngineConfig.report_interval_s`.

    Attributes:
        step_seconds: Durations of the steps since the last report, on the device itself.
        step_batch_sizes: Sequences in each of them.
        step_idle_share: Share of the time since the last report, less that without any work, in
            which the device waited for the next step; by a GPU's events, or on a CPU by the clock
            of the thread that computes.
    """

    device: PoolState
    host: PoolState
    counters: Counters
    running_sequences: int
    waiting_requests: int
    sessions: int
    load_bytes_per_s: float
    prefill_tokens_per_s: float
    loads_in_flight: int
    stores_in_flight: int
    step_seconds: list[float]
    step_batch_sizes: list[int]
    step_idle_share: float = 0.0


ToFront = (
    Progress
    | Ready
    | Failed
    | Started
    | Tokens
    | Finished
    | Rejected
    | CommandDone
    | SessionEvent
    | Snapshot
    | Report
)

_encoder = msgspec.msgpack.Encoder()
_to_engine = msgspec.msgpack.Decoder(list[ToEngine])
_to_front = msgspec.msgpack.Decoder(list[ToFront])


def encode(batch: Sequence[ToEngine] | Sequence[ToFront]) -> bytes:
    """Returns a batch as one frame."""
    return _encoder.encode(batch)


def decode_to_engine(frame: bytes) -> list[ToEngine]:
    """Returns the batch in a frame from the front; raises `msgspec.MsgspecError` for any other."""
    return _to_engine.decode(frame)


def decode_to_front(frame: bytes) -> list[ToFront]:
    """Returns the batch in a frame from the engine; raises `msgspec.MsgspecError` for any other."""
    return _to_front.decode(frame)
