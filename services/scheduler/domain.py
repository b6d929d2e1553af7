"""What workers and the scheduler tell each other, as plain data.

`convert` turns these to protobuf and back; everything else in the scheduler, and a simulator in
virtual time, sees only them. Times ending in `_s` are seconds since the epoch on the clock of
whoever passes `now_s` in, durations are seconds, sizes bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from enum import Enum, IntEnum
from typing import NamedTuple


class Phase(IntEnum):
    """Where an agent is in its cycle; the numbers are those of `djinn.v1.AgentPhase`."""

    OPEN = 1
    COMPUTE = 2
    IO_WAIT = 3
    CLOSED = 4


class Residency(NamedTuple):
    """Where a session's KV lies; the fields of `djinn.v1.KvResidency`."""

    total_blocks: int = 0
    device_blocks: int = 0
    host_blocks: int = 0
    missing_tokens: int = 0
    resident: bool = False


NO_KV = Residency()


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a worker serves; the fields of `djinn.v1.ModelInfo`."""

    model: str
    vocab_size: int = 0
    max_context_length: int = 0
    eos_token_ids: tuple[int, ...] = ()
    block_size_tokens: int = 0
    block_bytes: int = 0
    dtype: str = ""
    has_tokenizer: bool = False
    has_chat_template: bool = False


@dataclass(frozen=True, slots=True)
class Capacity:
    """How much a worker can hold and do."""

    device_blocks: int = 0
    host_blocks: int = 0
    max_running_sequences: int = 0
    max_step_tokens: int = 0


@dataclass(frozen=True, slots=True)
class PoolState:
    """Blocks of one pool by use; the four after `total` add up to it."""

    total: int = 0
    free: int = 0
    used: int = 0
    reclaimable: int = 0
    in_flight: int = 0

    @staticmethod
    def sum(pools: Iterable[PoolState]) -> PoolState:
        """Returns all the pools as one."""
        rows = [_values(pool) for pool in pools]
        return PoolState(*map(sum, zip(*rows, strict=True))) if rows else PoolState()


@dataclass(frozen=True, slots=True)
class Counters:
    """What a worker process has done since it started; the fields of `djinn.v1.WorkerCounters`."""

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

    @staticmethod
    def sum(counters: Iterable[Counters]) -> Counters:
        """Returns all the counters added up."""
        rows = [_values(item) for item in counters]
        return Counters(*map(sum, zip(*rows, strict=True))) if rows else Counters()


def _values(item: PoolState | Counters) -> tuple[int, ...]:
    return tuple(getattr(item, column.name) for column in fields(item))


@dataclass(frozen=True, slots=True)
class Report:
    """How full and how fast a worker is; rates are 0 until measured."""

    device: PoolState = field(default_factory=PoolState)
    host: PoolState = field(default_factory=PoolState)
    counters: Counters = field(default_factory=Counters)
    running_sequences: int = 0
    waiting_requests: int = 0
    sessions: int = 0
    mean_step_s: float | None = None
    load_bytes_per_s: float = 0.0
    prefill_tokens_per_s: float = 0.0
    loads_in_flight: int = 0
    stores_in_flight: int = 0


@dataclass(frozen=True, slots=True)
class SessionSnapshot:
    """One session as its worker holds it."""

    session_id: str
    generation: int
    context_length: int
    kv: Residency
    generating: bool
    record: bytes
    last_generate_s: float | None


@dataclass(frozen=True, slots=True)
class Hello:
    """Who a worker is and all it holds."""

    worker_id: str
    incarnation_id: str
    endpoint: str
    model: ModelInfo
    capacity: Capacity
    snapshot: tuple[SessionSnapshot, ...] = ()
    metrics_endpoint: str = ""
    draining: bool = False


@dataclass(frozen=True, slots=True)
class WorkerMode:
    """How a worker is to serve; the fields of `djinn.v1.WorkerMode`.

    Attributes:
        write_through: Blocks are copied to the host as soon as they are full.
        offload: What is evicted keeps a copy on the host; false: it is forgotten and recomputed.
        share_prefixes: Sessions share the blocks of equal prefixes.
    """

    write_through: bool = True
    offload: bool = True
    share_prefixes: bool = True


class EvictMode(IntEnum):
    """How thoroughly an eviction lets blocks go; the numbers of `djinn.v1.EvictMode`."""

    LAZY = 1
    RELEASE = 2
    SCRUB = 3


@dataclass(frozen=True, slots=True)
class Open:
    """Make the session known."""

    cache_salt: str
    priority: int


@dataclass(frozen=True, slots=True)
class Close:
    """End the session and forget it."""


@dataclass(frozen=True, slots=True)
class Evict:
    """Let its device blocks go, keep host copies; None: no idea when it wakes."""

    mode: EvictMode = EvictMode.LAZY
    expected_wake_s: float | None = None


@dataclass(frozen=True, slots=True)
class Restore:
    """Bring its KV to the device because it wakes."""


@dataclass(frozen=True, slots=True)
class Prefetch:
    """Bring its KV to the device because it soon will wake."""


@dataclass(frozen=True, slots=True)
class Drop:
    """Forget its KV, keep its tokens."""


@dataclass(frozen=True, slots=True)
class SetHint:
    """Tell what is expected of it, moving nothing."""

    expected_wake_s: float | None = None
    priority: int | None = None


Action = Open | Close | Evict | Restore | Prefetch | Drop | SetHint

MOVES = (Evict, Restore, Prefetch, Drop)
"""The actions that say where a session's KV shall lie: a later one supersedes an earlier."""


def name_of(action: Action) -> str:
    """Returns the action's name for metrics and traces, such as ``"set_hint"``."""
    return "set_hint" if isinstance(action, SetHint) else type(action).__name__.lower()


@dataclass(frozen=True, slots=True)
class Command:
    """An action on one session, as it goes to a worker.

    Attributes:
        expected_generation: Do nothing if the session's generation differs; None: do it anyway.
        deadline_s: After this the worker need not begin.
        traceparent: W3C trace context of the cause; empty: none.
        record: Replaces the session's record; None: it stays.
    """

    command_id: str
    session_id: str
    action: Action
    expected_generation: int | None = None
    deadline_s: float | None = None
    traceparent: str = ""
    record: bytes | None = None


@dataclass(frozen=True, slots=True)
class CommandResult:
    """How a command ended.

    Attributes:
        reason: Empty if well, else the reason of the error, such as ``"SESSION_BUSY"``.
        code: Name of the gRPC status code.
        kv: Where the session's KV lies now; None if the worker did not say.
    """

    command_id: str
    session_id: str
    code: str = "OK"
    reason: str = ""
    message: str = ""
    moved_bytes: int = 0
    moved_blocks: int = 0
    resident_blocks: int = 0
    copy_s: float = 0.0
    queue_s: float = 0.0
    generation: int = 0
    kv: Residency | None = None

    @property
    def ok(self) -> bool:
        """Whether the command was done."""
        return self.code == "OK"


class EventKind(Enum):
    """What happened to a session without a command."""

    CREATED = "created"
    GENERATE_STARTED = "generate_started"
    GENERATE_FINISHED = "generate_finished"
    EVICTED = "evicted"
    RESTORED = "restored"
    DROPPED = "dropped"


@dataclass(frozen=True, slots=True)
class SessionEvent:
    """A session has changed on its worker's own account."""

    kind: EventKind
    session: SessionSnapshot
    event_s: float
