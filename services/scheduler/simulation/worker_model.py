"""A worker without a GPU: takes the scheduler's commands and agents' Generates in virtual time.

It is safe by itself as the real one is: a Generate for an evicted session restores it, an eviction
of a running one is refused, and when room is short it evicts and drops as the real one does.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import fields
from functools import partial

from services.scheduler.coordinator import Coordinator
from services.scheduler.domain import (
    Capacity,
    Command,
    CommandResult,
    Counters,
    EventKind,
    Hello,
    ModelInfo,
    PoolState,
    Report,
    SessionEvent,
    SessionSnapshot,
)
from services.scheduler.registry import WorkerState
from services.scheduler.simulation.batch_model import Batch, ModelRequest
from services.scheduler.simulation.clock import Events
from services.scheduler.simulation.commands_model import CommandModel
from services.scheduler.simulation.lanes import Urgency
from services.scheduler.simulation.mover import ModelSession, Mover
from services.scheduler.simulation.parameters import WorkerParameters

FIGURES = (
    *(column.name for column in fields(Counters)),
    *(
        f"{side}_{column.name}_blocks"
        for side in ("device", "host")
        for column in fields(PoolState)
    ),
)
"""Names of a worker's counters and pools, as real runs record them."""


class WorkerModel:
    """One worker; it is the scheduler's link to itself.

    Args:
        events: The time.
        coordinator: The scheduler.
        parameters: What it can do.
        worker_id: Its name, which is its endpoint too.
        on_told: Called after the scheduler was told something.
    """

    def __init__(
        self,
        events: Events,
        coordinator: Coordinator,
        parameters: WorkerParameters,
        worker_id: str,
        on_told: Callable[[], None],
    ) -> None:
        self.worker_id = worker_id
        self.sessions: dict[str, ModelSession] = {}
        self._events = events
        self._coordinator = coordinator
        self._on_told = on_told
        self._parameters = parameters
        mode = coordinator.policy.worker_mode
        self._write_through = parameters.write_through and mode.write_through
        self._mover = Mover(events, parameters, self.turn, offload=mode.offload)
        self._batch = Batch(events, parameters, self._computed, self._finished, self._admit)
        self._commands = CommandModel(self, self._mover, events, parameters, self._deliver_result)
        self._watermark = int(parameters.low_watermark * parameters.device_blocks)
        # Requests that hold nothing yet; those whose load runs; those that could run.
        self._waiting: list[tuple[tuple[int, bool, int], ModelRequest]] = []
        self._loading = 0
        self._ready: list[tuple[tuple[int, bool, int], ModelRequest]] = []
        self._requests = 0
        self._reported_steps = (0, 0.0)
        self._recomputed = 0
        self._generated = 0
        self._completed = 0
        self._state: WorkerState = coordinator.workers.connected(self._hello(), self, events.now_s)

    # --- as the scheduler's link -----------------------------------------------------------------

    def send(self, command: Command, caused_s: float | None) -> None:
        """Takes a command on its way."""
        del caused_s
        self._events.after(self._parameters.latencies.command_s, self._commands.begin, command)

    def close(self, reason: str) -> None:
        """The scheduler ends no stream of a worker that reports."""
        raise AssertionError(f"the scheduler closed {self.worker_id}'s stream: {reason}")

    # --- clients ---------------------------------------------------------------------------------

    def submit(
        self,
        session_id: str,
        append_tokens: int,
        new_tokens: int,
        on_done: Callable[[ModelRequest], None],
    ) -> ModelRequest:
        """Takes a Generate that has arrived.

        Args:
            session_id: Whose; made if it is not known, as from a client's token.
            append_tokens: Tokens that it adds to the context.
            new_tokens: Tokens to generate.
            on_done: Told when the last token is there.

        Returns:
            The request.
        """
        session = self.sessions.get(session_id)
        if session is None:
            session = self.create(session_id, 0, b"")
            self._tell(EventKind.CREATED, session)
        request = ModelRequest(session, append_tokens, new_tokens, on_done)
        request.submitted_s = self._events.now_s
        self._requests += 1
        request.order = (-session.priority, not session.known_tokens, self._requests)
        session.log_tokens += append_tokens
        session.generation += 1
        session.kv.busy = True
        request.prompt_tokens = session.log_tokens
        heapq.heappush(self._waiting, (request.order, request))
        self._tell(EventKind.GENERATE_STARTED, session)
        self.turn()
        return request

    def fits(self, context_tokens: int) -> bool:
        """Returns whether a context of so many tokens can ever be held."""
        kv = self._mover.kv
        fits_pool = kv.blocks_for(context_tokens) <= kv.device_blocks
        return fits_pool and context_tokens <= self._parameters.max_context_length

    # --- turns -----------------------------------------------------------------------------------

    def turn(self) -> None:
        """Starts what can be started."""
        self._admit()
        self._batch.go_on()

    def _admit(self) -> None:
        """Lets requests run whose KV is on the device, and starts loads for others."""
        self._commands.retry()
        if self._mover.kv.available() < self._watermark:
            self.make_room(self._watermark)
        while self._waiting:
            request = self._waiting[0][1]
            if not self._hold(request):
                break
            heapq.heappop(self._waiting)
            if request.session.kv.loading:
                self._loading += 1
                request.session.after_load.append(partial(self._arrived, request))
            else:
                heapq.heappush(self._ready, (request.order, request))
        while self._ready and self._batch.running < self._parameters.max_running_sequences:
            self._batch.add(heapq.heappop(self._ready)[1])

    def _hold(self, request: ModelRequest) -> bool:
        session, kv = request.session, self._mover.kv
        blocks = kv.blocks_for(request.prompt_tokens + request.new_tokens)
        more = max(0, blocks - session.kv.blocks)
        if self._mover.hold(session, Urgency.WAKE, more):
            return True
        self.make_room(kv.room_needed(session.kv, more))
        # Its own KV may have had to go.
        more = max(0, blocks - session.kv.blocks)
        return self._mover.hold(session, Urgency.WAKE, more)

    def _arrived(self, request: ModelRequest) -> None:
        self._loading -= 1
        heapq.heappush(self._ready, (request.order, request))

    def make_room(self, want: int) -> None:
        """Works towards `want` available device blocks, and tells whose KV had to go."""
        last_first = (entry[1].session for entry in sorted(self._waiting, reverse=True))
        evicted, dropped = self._mover.make_room(want, last_first)
        for session in evicted:
            self._tell(EventKind.EVICTED, session)
        for session in dropped:
            self._tell(EventKind.DROPPED, session)

    def _computed(self, request: ModelRequest, tokens: int) -> None:
        """Takes in that a request's KV has grown to `tokens` tokens."""
        session = request.session
        self._recomputed += max(0, min(tokens, session.known_tokens) - session.kv.tokens)
        self._mover.kv.advance(session.kv, tokens)
        session.known_tokens = max(session.known_tokens, tokens)
        if self._write_through:
            self._mover.write_through(session)

    def _finished(self, request: ModelRequest) -> None:
        session = request.session
        session.log_tokens += request.new_tokens
        session.generation += 1
        session.last_generate_s = self._events.now_s
        session.kv.busy = False
        self._generated += request.new_tokens
        self._completed += 1
        kv = self._mover.kv
        kv.trim(session.kv)
        kv.use(session.kv)
        kv.rest(session.kv)
        self._tell(EventKind.GENERATE_FINISHED, session)
        request.on_done(request)
        session.resident_blocks = session.loaded_blocks = 0
        session.load_s = session.load_start_s = 0.0

    # --- what the scheduler is told --------------------------------------------------------------

    def report(self) -> None:
        """Tells the scheduler how full and how fast the worker is."""
        now_s = self._events.now_s
        self._coordinator.workers.heard(self._state, now_s)
        steps, seconds = self._batch.steps, self._batch.step_seconds
        before, before_s = self._reported_steps
        self._reported_steps = (steps, seconds)
        device, host = self.pools()
        report = Report(
            device=device,
            host=host,
            counters=self.counters(),
            running_sequences=self._batch.running,
            waiting_requests=len(self._waiting) + self._loading + len(self._ready),
            sessions=len(self.sessions),
            mean_step_s=(seconds - before_s) / (steps - before) if steps > before else None,
            load_bytes_per_s=self._mover.load_bytes_per_s,
            prefill_tokens_per_s=self._batch.prefill_tokens_per_s,
            loads_in_flight=self._mover.loads.in_flight,
            stores_in_flight=self._mover.stores.in_flight,
        )
        self._coordinator.workers.reported(self._state, report)
        self._on_told()

    def _deliver_result(self, result: CommandResult) -> None:
        self._coordinator.workers.ended(result, self._events.now_s)
        self._on_told()

    def counters(self) -> Counters:
        """Returns what it has done."""
        return Counters(*self._counts())

    def pools(self) -> tuple[PoolState, PoolState]:
        """Returns the blocks of the device pool and of the host pool by use."""
        device, host = self._uses()
        return PoolState(*device), PoolState(*host)

    def figures(self) -> tuple[int, ...]:
        """Returns counters and pools, in the order of `FIGURES`."""
        device, host = self._uses()
        return self._counts() + device + host

    def _counts(self) -> tuple[int, ...]:
        moved = self._mover.counters
        return (
            moved.stores,
            moved.loads,
            moved.stored_bytes,
            moved.loaded_bytes,
            moved.resident_hit_blocks,
            moved.evictions,
            moved.restores,
            moved.prefetches,
            moved.drops,
            0,  # none is preempted
            self._batch.prefilled_tokens,
            self._recomputed,
            0,  # there are no shared prefixes
            self._generated,
            self._completed,
            0,
            0,
        )

    def _uses(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        kv = self._mover.kv
        used = kv.device_blocks - kv.device_free - kv.reclaimable - kv.moving
        host_used = kv.host_blocks - kv.host_free - kv.host_spare - kv.host_moving
        return (
            (kv.device_blocks, kv.device_free, used, kv.reclaimable, kv.moving),
            (kv.host_blocks, kv.host_free, host_used, kv.host_spare, kv.host_moving),
        )

    def check_integrity(self) -> None:
        """Raises `AssertionError` if the bookkeeping contradicts itself."""
        self._mover.check_integrity()

    def create(self, session_id: str, priority: int, record: bytes) -> ModelSession:
        """Makes a session that is not there yet."""
        session = self.sessions[session_id] = ModelSession(session_id, priority, record)
        self._mover.add(session)
        return session

    def _tell(self, kind: EventKind, session: ModelSession) -> None:
        event = SessionEvent(
            kind,
            SessionSnapshot(
                session.session_id,
                session.generation,
                session.log_tokens,
                session.residency(),
                session.kv.busy,
                session.record,
                session.last_generate_s,
            ),
            self._events.now_s,
        )
        self._events.after(self._parameters.latencies.event_s, self._deliver_event, event)

    def _deliver_event(self, event: SessionEvent) -> None:
        self._coordinator.workers.happened(self._state, event, self._events.now_s)
        self._on_told()

    def _hello(self) -> Hello:
        parameters = self._parameters
        return Hello(
            worker_id=self.worker_id,
            incarnation_id=f"{self.worker_id}/1",
            endpoint=self.worker_id,
            model=ModelInfo(
                parameters.model,
                max_context_length=parameters.max_context_length,
                block_size_tokens=parameters.block_size_tokens,
                block_bytes=parameters.block_bytes,
            ),
            capacity=Capacity(
                parameters.device_blocks,
                parameters.host_blocks,
                parameters.max_running_sequences,
                parameters.max_step_tokens,
            ),
        )
