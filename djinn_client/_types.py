"""What goes into and comes out of the client, as plain values.

Durations are in seconds, sizes in bytes, counts in tokens or blocks as their names say.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypedDict


class Phase(StrEnum):
    """Where an agent is in its cycle of reasoning, acting and reflecting."""

    OPEN = "OPEN"
    COMPUTE = "COMPUTE"
    IO_WAIT = "IO_WAIT"
    CLOSED = "CLOSED"


class FinishReason(StrEnum):
    """Why a generation ended: a stop token or stop string, or the length limit."""

    STOP = "stop"
    LENGTH = "length"


class EvictMode(StrEnum):
    """How thoroughly an eviction lets device blocks go.

    LAZY leaves them readable until somebody needs their place; RELEASE frees them at once, so that
    a restore must copy; SCRUB also overwrites them, for verification.
    """

    LAZY = "lazy"
    RELEASE = "release"
    SCRUB = "scrub"


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation, rendered by the model's own chat template.

    Attributes:
        role: "system", "user", "tool" or whatever the template knows.
        content: What was said.
    """

    role: str
    content: str


def system(content: str) -> Turn:
    """Returns a system turn."""
    return Turn("system", content)


def user(content: str) -> Turn:
    """Returns a user's turn."""
    return Turn("user", content)


def tool_result(content: str) -> Turn:
    """Returns a turn of role "tool"; many models' templates know only system, user, assistant."""
    return Turn("tool", content)


Prompt = str | Turn | Sequence[Turn] | Sequence[int]
"""Raw text, one or several turns, or token ids."""


class GenerateOptions(TypedDict, total=False):
    """Keyword arguments of `generate`, `generate_text` and `chat`.

    Attributes:
        full_context: Token ids that replace the session's context; KV of the longest common prefix
            is kept. None: the context is continued.
        max_tokens: Most tokens to generate, at least 1; None: as many as the context has room for.
        temperature: 0 is greedy, at most 100; None: 0.
        top_k: Only the k likeliest tokens may be chosen, at least 1; None: all.
        top_p: Only the likeliest tokens that together have this probability, above 0 and at most
            1; None: 1.
        seed: Makes sampling repeatable, 0 to 2**64 - 1; None: the client draws one.
        stop: A text, or up to 16, that end the generation when they appear, 1 to 256 characters.
        stop_token_ids: Up to 64 ids that end it, besides the model's own.
        ignore_eos: The model's end-of-sequence tokens do not end it.
        logprobs: Return each token's log-probability and those of this many likeliest tokens
            beside it, 0 to 20; None: none.
        return_logits: Diagnostic: pieces carry the whole float32 logits.
        timeout_s: Most seconds for the whole generation, retries included; None: the client's.
        request_id: Names the call in logs and traces, at most 128 characters; None: one is made.
    """

    full_context: Sequence[int] | None
    max_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    seed: int | None
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logprobs: int | None
    return_logits: bool
    timeout_s: float | None
    request_id: str | None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token's natural-log probability, before temperature and cut-offs."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """Log-probabilities at one generated position: the chosen token and the likeliest ones."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """What one step added to a generation.

    Attributes:
        text: Text that is certain now. It may be empty or belong to earlier ids, since a character
            or a stop string can span several tokens.
        token_ids: New ids; empty where only text that had been held back is sent.
        logprobs: One entry per id, if asked for.
        logits: One entry per id, if asked for: vocabulary-size little-endian float32.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...] = ()
    logits: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """What a generation cost, in tokens.

    Attributes:
        prompt_tokens: Context and prompt together.
        cached_tokens: Of these, tokens whose KV was found rather than computed.
        prefilled_tokens: Tokens prefilled, those after a lost worker included.
        completion_tokens: Tokens generated.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    prefilled_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True)
class KvSource:
    """Where the KV that a generation needed was found when it first ran.

    Attributes:
        held_blocks: Blocks still on the device and held for the session.
        resident_blocks: Blocks of an evicted session that nobody had reused.
        loaded_blocks: Blocks copied from the host.
        loaded_bytes: Bytes of those copies.
        recomputed_tokens: Tokens whose KV had to be computed again.
        load_s: From the first copy's start to the last one's end.
        prefix_hit_tokens: Tokens found in the shared prefix index.
    """

    held_blocks: int = 0
    resident_blocks: int = 0
    loaded_blocks: int = 0
    loaded_bytes: int = 0
    recomputed_tokens: int = 0
    load_s: float = 0.0
    prefix_hit_tokens: int = 0


@dataclass(frozen=True, slots=True)
class GenerateResult:
    """A finished generation.

    Attributes:
        text: All text, without a stop string that ended it.
        token_ids: All generated ids.
        finish_reason: Why it ended.
        stop_string: The stop string that ended it, if one did.
        usage: What it cost.
        kv: Where its KV came from.
        queue_s: Time it waited at the worker until its first step.
        first_token_s: From the call to the first token id received, client's clock.
        duration_s: From the call to its end, client's clock.
        wake_latency_s: From COMPUTE sent to the first token id received, client's clock; None if
            it was not the first generation after an IO_WAIT.
        resumptions: How often its worker was lost, or had lost the context, and it went on.
        logprobs: One entry per id, if asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_string: str | None
    usage: Usage
    kv: KvSource
    queue_s: float
    first_token_s: float
    duration_s: float
    wake_latency_s: float | None
    resumptions: int
    logprobs: tuple[PositionLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class KvResidency:
    """Where the KV of one session lies, in blocks; a block on both sides counts in both.

    Attributes:
        total_blocks: Blocks that the computed context fills.
        device_blocks: Blocks readable on the device.
        host_blocks: Blocks of which the host pool holds a complete copy.
        missing_tokens: Tokens that would be prefilled again.
        resident: False if the session is evicted.
    """

    total_blocks: int = 0
    device_blocks: int = 0
    host_blocks: int = 0
    missing_tokens: int = 0
    resident: bool = False


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """One session as the scheduler knows it; times are the scheduler's, in UTC."""

    session_id: str
    name: str
    tenant: str
    priority: int
    phase: Phase
    phase_sequence: int
    open_time: dt.datetime | None
    phase_time: dt.datetime | None
    tool_name: str
    expected_wake_time: dt.datetime | None
    expire_time: dt.datetime | None
    worker_id: str
    worker_endpoint: str
    context_length: int
    generation: int
    kv: KvResidency


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a worker serves.

    Attributes:
        model: The name the model was loaded by.
        vocab_size: Valid ids are 0 to vocab_size - 1.
        max_context_length: Most tokens in a context, prompt and output together.
        eos_token_ids: Ids that end a generation unless `ignore_eos` is set.
        block_size_tokens: Tokens per KV block.
        block_bytes: Bytes per KV block.
        dtype: Element type of weights and KV, as torch names it.
        has_tokenizer: Text can be sent and returned.
        has_chat_template: Turns can be appended.
    """

    model: str
    vocab_size: int
    max_context_length: int
    eos_token_ids: tuple[int, ...]
    block_size_tokens: int
    block_bytes: int
    dtype: str
    has_tokenizer: bool
    has_chat_template: bool


@dataclass(frozen=True, slots=True)
class PoolInfo:
    """Blocks of one memory pool by use; the four after `total_blocks` add up to it."""

    total_blocks: int = 0
    free_blocks: int = 0
    used_blocks: int = 0
    reclaimable_blocks: int = 0
    in_flight_blocks: int = 0


@dataclass(frozen=True, slots=True)
class Counters:
    """What one worker, or all together, have done; as `djinn.v1.WorkerCounters` says."""

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


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A connected worker.

    Attributes:
        worker_id: Its name.
        incarnation_id: Its process.
        endpoint: host:port that generations are sent to.
        model: What it serves.
        device_blocks: Size of its device pool.
        host_blocks: Size of its host pool.
        max_running_sequences: Most sequences in one step.
        max_step_tokens: Most tokens in one step.
        device: Its device pool, as last reported.
        host: Its host pool, as last reported.
        counters: What it has done, as last reported.
        draining: No sessions are placed on it.
        sessions: Sessions placed on it.
    """

    worker_id: str
    incarnation_id: str
    endpoint: str
    model: ModelInfo
    device_blocks: int
    host_blocks: int
    max_running_sequences: int
    max_step_tokens: int
    device: PoolInfo
    host: PoolInfo
    counters: Counters
    draining: bool
    sessions: int


@dataclass(frozen=True, slots=True)
class CommandOutcome:
    """What a worker did on an evict, restore or drop.

    Attributes:
        moved_bytes: Bytes its copies moved.
        moved_blocks: Blocks its copies moved.
        resident_blocks: Blocks that needed no copy.
        copy_s: From the first copy's start to the last one's end.
        queue_s: From the command's arrival to the first copy's start.
        generation: The session's generation.
        kv: Where its KV lies now.
    """

    moved_bytes: int
    moved_blocks: int
    resident_blocks: int
    copy_s: float
    queue_s: float
    generation: int
    kv: KvResidency


@dataclass(frozen=True, slots=True)
class Stats:
    """What the system has done since the scheduler started, all workers together.

    Attributes:
        counters: Counters of all workers, those of lost ones included, as of `report_time_s`.
        phases: Open sessions in each phase.
        policy: The policy in force.
        uptime_s: Since the scheduler started.
        device: All device pools together.
        host: All host pools together.
        report_time_s: When the oldest of the connected workers' last reports came, in seconds since
            the epoch on the scheduler's clock; None: there is none of some worker, or no worker.
        answer_time_s: When this was answered, on the same clock; None: the scheduler does not say.
    """

    counters: Counters
    phases: Mapping[Phase, int] = field(default_factory=dict)
    policy: str = ""
    uptime_s: float = 0.0
    device: PoolInfo = field(default_factory=PoolInfo)
    host: PoolInfo = field(default_factory=PoolInfo)
    report_time_s: float | None = None
    answer_time_s: float | None = None
