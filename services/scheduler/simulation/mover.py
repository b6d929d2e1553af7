"""Moves a modelled worker's KV between its tiers, and makes room when it is short."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from services.scheduler.domain import Residency
from services.scheduler.simulation.clock import Events
from services.scheduler.simulation.kv_model import KvModel, SessionKv
from services.scheduler.simulation.lanes import Copy, Lane, Urgency
from services.scheduler.simulation.parameters import WorkerParameters


@dataclass(slots=True)
class MoverCounters:
    """What has been moved; the names are those of `domain.Counters`."""

    stores: int = 0
    loads: int = 0
    stored_bytes: int = 0
    loaded_bytes: int = 0
    resident_hit_blocks: int = 0
    evictions: int = 0
    restores: int = 0
    prefetches: int = 0
    drops: int = 0


class ModelSession:
    """One session on a modelled worker.

    Attributes:
        session_id: Its id.
        priority: Larger is served earlier.
        record: Kept for the scheduler.
        kv: Its blocks.
        log_tokens: Tokens of its log.
        known_tokens: Most tokens whose KV it ever had.
        generation: Bumped at the start and the end of each request.
        last_generate_s: When its last request ended; None: none has.
        resident_blocks: Blocks found on the device since its last request ended.
        loaded_blocks: Blocks loaded since.
        load_s: Time that its loads took since, from the first one's start to the last one's end.
        load_start_s: When the first of them began; 0: none has.
        after_load: To be called once nothing is being loaded.
        after_store: To be called once nothing is being stored.
    """

    __slots__ = (
        "after_load",
        "after_store",
        "generation",
        "known_tokens",
        "kv",
        "last_generate_s",
        "load_s",
        "load_start_s",
        "loaded_blocks",
        "log_tokens",
        "priority",
        "record",
        "resident_blocks",
        "session_id",
    )

    def __init__(self, session_id: str, priority: int, record: bytes) -> None:
        self.session_id = session_id
        self.priority = priority
        self.record = record
        self.kv = SessionKv()
        self.log_tokens = 0
        self.known_tokens = 0
        self.generation = 0
        self.last_generate_s: float | None = None
        self.resident_blocks = 0
        self.loaded_blocks = 0
        self.load_s = 0.0
        self.load_start_s = 0.0
        self.after_load: list[Callable[[], None]] = []
        self.after_store: list[Callable[[], None]] = []

    def residency(self) -> Residency:
        """Returns where its KV lies."""
        kv = self.kv
        return Residency(
            kv.blocks,
            kv.device - kv.loading,
            kv.clean,
            self.log_tokens - kv.tokens,
            kv.held,
        )

    def answer_all(self) -> None:
        """Calls all that waits for copies: there will be none any more."""
        _call(self.after_load)
        _call(self.after_store)


class Mover:
    """The tiers of one worker.

    Args:
        events: The time.
        parameters: The worker's.
        on_change: Called when a copy is done, after all that follows for its session.
        offload: What is evicted keeps a copy on the host; else it is there until its blocks are
            reused, and is computed again.
    """

    def __init__(
        self,
        events: Events,
        parameters: WorkerParameters,
        on_change: Callable[[], None],
        *,
        offload: bool = True,
    ) -> None:
        self.kv = KvModel(
            parameters.device_blocks,
            parameters.host_blocks if offload else 0,
            parameters.block_size_tokens,
            offload=offload,
        )
        self.counters = MoverCounters()
        self.load_bytes_per_s = 0.0
        self._events = events
        self._block_bytes = parameters.block_bytes
        self._on_change = on_change
        both = parameters.both_ways_bytes_per_s
        latency = parameters.copy_latency_s
        self.loads = Lane(
            events, self._block_bytes, parameters.load_bytes_per_s, both, latency, self._loaded
        )
        self.stores = Lane(
            events, self._block_bytes, parameters.store_bytes_per_s, both, latency, self._stored
        )
        self.loads.other, self.stores.other = self.stores, self.loads
        self._of: dict[SessionKv, ModelSession] = {}
        # Evicted with blocks that the host had no room for; in order of eviction.
        self._stranded: dict[ModelSession, None] = {}

    # --- one session -----------------------------------------------------------------------------

    def add(self, session: ModelSession) -> None:
        """Takes a new session in."""
        self._of[session.kv] = session

    def forget(self, session: ModelSession) -> None:
        """Frees all that a session has and forgets it."""
        self._stranded.pop(session, None)
        self.kv.drop(session.kv)
        del self._of[session.kv]

    def hold(self, session: ModelSession, urgency: Urgency, more: int = 0) -> bool:
        """Holds a session's blocks and starts the load that this takes.

        Returns:
            False, with nothing changed, if there is no room.
        """
        kv = session.kv
        if kv.held:
            if kv.loading:
                self.loads.hasten(kv, urgency)
            return self.kv.hold(kv, more) is not None
        resident = kv.device
        missing = self.kv.hold(kv, more)
        if missing is None:
            return False
        self._stranded.pop(session, None)
        self.kv.use(kv)
        if kv.blocks:
            self.counters.resident_hit_blocks += resident
            if urgency is Urgency.PREFETCH:
                self.counters.prefetches += 1
            else:
                self.counters.restores += 1
        session.resident_blocks += resident
        session.loaded_blocks += missing
        if missing:
            self.loads.submit(Copy(kv, missing, urgency))
        elif not kv.busy:
            self.kv.rest(kv)
        return True

    def evict(self, session: ModelSession) -> None:
        """Lets a session's device blocks go and starts the store that this takes."""
        if session.kv.held:
            self.kv.unhold(session.kv)
        if not self.kv.offload:
            return
        self._store(session, Urgency.EVICT, full_only=False, give_up_copies=True)
        if session.kv.dirty:
            self._stranded[session] = None

    def drop(self, session: ModelSession) -> None:
        """Forgets a session's KV on both sides."""
        self._stranded.pop(session, None)
        self.kv.drop(session.kv)
        self.counters.drops += 1

    def write_through(self, session: ModelSession) -> None:
        """Stores a session's full blocks, as far as the host has free ones."""
        self._store(session, Urgency.WRITE_THROUGH, full_only=True, give_up_copies=False)

    def _store(
        self, session: ModelSession, urgency: Urgency, *, full_only: bool, give_up_copies: bool
    ) -> None:
        blocks = self.kv.begin_store(session.kv, full_only=full_only, give_up_copies=give_up_copies)
        if blocks:
            self.stores.submit(Copy(session.kv, blocks, urgency))
        if session.kv.storing and urgency is Urgency.EVICT:
            self.stores.hasten(session.kv, urgency)

    # --- copies ----------------------------------------------------------------------------------

    def _loaded(self, copy: Copy) -> None:
        size = copy.blocks * self._block_bytes
        now_s = self._events.now_s
        speed = size / max(now_s - copy.start_s, 1e-9)
        past = self.load_bytes_per_s
        self.load_bytes_per_s = 0.8 * past + 0.2 * speed if past else speed
        self.counters.loads += 1
        self.counters.loaded_bytes += size
        self.kv.loaded(copy.kv, copy.epoch, copy.blocks)
        session = self._of.get(copy.kv)
        if session is not None and copy.epoch == copy.kv.epoch:
            session.load_start_s = session.load_start_s or copy.start_s
            session.load_s = now_s - session.load_start_s
            _call(session.after_load)
        self._on_change()

    def _stored(self, copy: Copy) -> None:
        self.counters.stores += 1
        self.counters.stored_bytes += copy.blocks * self._block_bytes
        self.kv.stored(copy.kv, copy.epoch, copy.blocks)
        session = self._of.get(copy.kv)
        if session is not None and not copy.kv.storing:
            _call(session.after_store)
        self.store_stranded()
        self._on_change()

    def store_stranded(self) -> None:
        """Tries again to store evicted sessions that the host had no room for."""
        while self._stranded and self.kv.host_free:
            session = next(iter(self._stranded))
            del self._stranded[session]
            if not session.kv.held:
                self.evict(session)

    # --- when room is short ----------------------------------------------------------------------

    def make_room(
        self, want: int, waiting: Iterable[ModelSession]
    ) -> tuple[list[ModelSession], list[ModelSession]]:
        """Works towards `want` available device blocks, as the worker does.

        Idle sessions on the device are evicted; where the host has no room for what they hold,
        evicted ones are dropped: idle ones first, then waiting ones.

        Args:
            want: How many blocks shall be available.
            waiting: Sessions whose request waits, the last to be served first.

        Returns:
            Those that were evicted, and those that were dropped.
        """
        evicted: list[ModelSession] = []
        dropped: list[ModelSession] = []
        while self.kv.coming() < want:
            kv = self.kv.pop_idle_held()
            if kv is None:
                break
            self.evict(self._of[kv])
            self.counters.evictions += 1
            evicted.append(self._of[kv])
        if self.kv.coming() >= want or not self._stranded:
            return evicted, dropped
        while self._stranded and self.kv.coming() < want:
            kv = self.kv.pop_idle_evicted()
            if kv is None:
                break
            self._drop_for_others(self._of[kv], dropped)
        for session in waiting:
            if not self._stranded or self.kv.coming() >= want:
                break
            if not session.kv.held and session.kv.blocks:
                self._drop_for_others(session, dropped)
        return evicted, dropped

    def _drop_for_others(self, session: ModelSession, dropped: list[ModelSession]) -> None:
        self.drop(session)
        dropped.append(session)
        self.store_stranded()

    def check_integrity(self) -> None:
        """Raises `AssertionError` if the bookkeeping contradicts itself."""
        orphans = tuple(
            sum(copy.blocks for copy in lane.waiting() if copy.epoch != copy.kv.epoch)
            for lane in (self.loads, self.stores)
        )
        assert len(orphans) == 2
        self.kv.check_integrity(list(self._of), orphans)


def _call(waiting: list[Callable[[], None]]) -> None:
    if waiting:
        actions = waiting[:]
        waiting.clear()
        for action in actions:
            action()
