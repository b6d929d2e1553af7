"""The engine: sessions, their requests and commands, and the step loop's turns.

Nothing here blocks. `handle` takes messages in; `collect` takes in the steps that are done, so that
their tokens go out first; `turn` takes in the copies that are done, admits, and launches the next
step, mostly while one still runs. All leave what the front shall hear in `outbox`.
"""

from __future__ import annotations

import dataclasses
import time
from collections import OrderedDict

import msgspec

from services.common.errors import (
    CancelledError,
    DjinnError,
    DrainingError,
    SessionClosedError,
    UnknownSessionError,
)
from services.worker.engine import requests
from services.worker.engine.batcher import Batcher
from services.worker.engine.block_manager import BlockManager
from services.worker.engine.commands import Commands
from services.worker.engine.kv_cache import KVCache
from services.worker.engine.kv_mover import KvMover
from services.worker.engine.room import Room
from services.worker.engine.sequence import Request, Session
from services.worker.engine.step_clock import StepClock
from services.worker.engine.step_outcomes import StepOutcomes, Tally
from services.worker.engine.step_pipeline import StepPipeline, StepRunner
from services.worker.engine.streams import Stream
from services.worker.messages import (
    Abort,
    Command,
    Counters,
    Finished,
    FinishReason,
    GetSnapshot,
    Mode,
    Rejected,
    Report,
    SessionEvent,
    SessionEventKind,
    SessionState,
    SetMode,
    Shutdown,
    Snapshot,
    StopAt,
    Submit,
    ToEngine,
    ToFront,
)

_CLOSED_REMEMBERED = 10_000


@dataclasses.dataclass(frozen=True, slots=True)
class EngineLimits:
    """What the engine is built for.

    Attributes:
        vocab_size: Valid token ids are below it.
        max_context_length: Most tokens in a context.
        max_running_sequences: Most sessions in a step.
        max_step_tokens: Most tokens in a step.
        write_through: Copy blocks to the host as soon as they are full.
        low_watermark: Share of each pool's blocks that is kept available ahead of need.
        hash_salt: Model revision, dtype and layout, for the hashes of blocks.
    """

    vocab_size: int
    max_context_length: int
    max_running_sequences: int
    max_step_tokens: int
    write_through: bool
    low_watermark: float
    hash_salt: bytes


class Engine:
    """All sessions of one worker.

    Args:
        mover: Moves KV; its block manager is the bookkeeping.
        runner: Launches steps on `compute`.
        compute: The stream that steps run on.
        cache: The device pool.
        limits: What the engine is built for.
        clock: Says when a step is launched behind one that runs.

    Attributes:
        outbox: What the front shall hear.
        sessions: By id.
        stopping: The front wants the engine to end.
        due_s: When `turn` shall be called next, by `time.monotonic`, if nothing happens before;
            None: not before something happens.
    """

    def __init__(
        self,
        mover: KvMover,
        runner: StepRunner,
        compute: Stream,
        cache: KVCache,
        limits: EngineLimits,
        clock: StepClock,
    ) -> None:
        self.outbox: list[ToFront] = []
        self.sessions: dict[str, Session] = {}
        self.stopping = False
        self.due_s: float | None = None
        self._mover = mover
        self._blocks: BlockManager = mover.blocks
        self._pipeline = StepPipeline(runner, compute, clock)
        self._limits = limits
        self._room = Room(mover, self.sessions, self.tell)
        self._batcher = Batcher(
            mover, self._room, limits.max_running_sequences, limits.max_step_tokens
        )
        self._commands = Commands(
            self, mover, self._room, lambda slots: cache.scrub(slots, compute)
        )
        self._requests: dict[str, Session] = {}
        # A late Generate of theirs, which carries a token, must not make them anew.
        self._closed: OrderedDict[str, None] = OrderedDict()
        self._arrivals = 0
        self._tally = Tally()
        self._outcomes = StepOutcomes(self, mover, self._tally)
        self._set_mode(Mode())

    # --- messages --------------------------------------------------------------------------------

    def handle(self, message: ToEngine) -> None:
        """Takes in one message of the front's."""
        match message:
            case Submit():
                self._submit(message)
            case Abort():
                self.cancel(
                    self._requests.get(message.request_id),
                    CancelledError("the client cancelled it"),
                )
            case StopAt():
                self._stop_at(message)
            case Command():
                self._commands.begin(message)
            case SetMode():
                self._set_mode(message.mode)
            case GetSnapshot():
                states = [self.state_of(session) for session in self.sessions.values()]
                self.outbox.append(Snapshot(message.snapshot_id, states))
            case Shutdown():
                for session in list(self._requests.values()):
                    self.cancel(session, DrainingError("the worker stops"))
                self.stopping = True

    def _set_mode(self, mode: Mode) -> None:
        """Serves as told from now on, as far as the engine's own limits allow."""
        write_through = self._limits.write_through and mode.write_through and mode.offload
        narrowed = msgspec.structs.replace(mode, write_through=write_through)
        for session in self._mover.set_mode(narrowed):
            self.tell(SessionEventKind.DROPPED, session)

    def create(self, session_id: str, cache_salt: str, priority: int, record: bytes) -> Session:
        """Makes a session that is not there yet."""
        session = Session(
            session_id=session_id,
            hash_salt=self._limits.hash_salt + b"\0" + cache_salt.encode(),
            priority=priority,
            scheduler_record=record,
            used_ns=time.time_ns(),
        )
        self.sessions[session_id] = session
        self._closed.pop(session_id, None)
        return session

    def close(self, session: Session) -> None:
        """Ends a session and forgets it."""
        self.cancel(session, _closed_error(session.session_id))
        self._mover.forget(session)
        self._commands.forget(session)
        del self.sessions[session.session_id]
        self._closed[session.session_id] = None
        if len(self._closed) > _CLOSED_REMEMBERED:
            self._closed.popitem(last=False)

    def cancel(self, session: Session | None, error: DjinnError) -> None:
        """Fails a session's request with `error`; does nothing if it has none."""
        if session is None or session.request is None:
            return
        request_id = session.request.request_id
        self._tally.requests_cancelled += 1
        self._leave(session)
        self.outbox.append(Rejected(request_id, error.to_info()))
        self.tell(SessionEventKind.GENERATE_FINISHED, session)

    def tell(self, kind: SessionEventKind, session: Session) -> None:
        """Tells the front that a session has changed."""
        self.outbox.append(SessionEvent(kind, self.state_of(session), time.time_ns()))

    def state_of(self, session: Session) -> SessionState:
        """Returns a session as plain data."""
        return SessionState(
            session_id=session.session_id,
            generation=session.generation,
            context_length=len(session.tokens),
            kv=self._blocks.residency(session.kv, len(session.tokens)),
            generating=session.request is not None,
            scheduler_record=session.scheduler_record,
            last_generate_ns=session.last_generate_ns,
        )

    def _submit(self, submit: Submit) -> None:
        session = self.sessions.get(submit.session_id)
        created = session is None
        try:
            if session is None:
                if submit.session_id in self._closed:
                    raise _closed_error(submit.session_id)
                if not submit.create:
                    raise UnknownSessionError.of(submit.session_id)
                session = self.create(
                    submit.session_id, submit.cache_salt, submit.priority, submit.scheduler_record
                )
            requests.begin(
                session,
                submit,
                self._blocks,
                arrival=self._arrivals,
                vocab_size=self._limits.vocab_size,
                max_context_length=self._limits.max_context_length,
            )
        except DjinnError as error:
            self._tally.requests_failed += 1
            self.outbox.append(Rejected(submit.request_id, error.to_info()))
            return
        finally:
            if created and session is not None:
                self.tell(SessionEventKind.CREATED, session)
        self._arrivals += 1
        self._requests[submit.request_id] = session
        self._batcher.add(session)
        self.tell(SessionEventKind.GENERATE_STARTED, session)

    def _stop_at(self, message: StopAt) -> None:
        session = self.sessions.get(message.session_id)
        if session is None:
            return
        if session.request is not None and session.request.request_id == message.request_id:
            self._cut(session, max(message.context_length, session.request.prompt_length))
            self.finish(session, FinishReason.STOP)
        elif session.request is None and session.last_request_id == message.request_id:
            # It ended by itself meanwhile, with more tokens than the client was given.
            self._cut(session, message.context_length)

    def _cut(self, session: Session, length: int) -> None:
        if length < len(session.tokens):
            session.cut(length, self._blocks.block_size_tokens)
            self._blocks.truncate(session.kv, length)

    # --- turns -----------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """True if nothing is under way: no request, no step and no copy."""
        return not self._requests and self._pipeline.empty and not self._mover.tickets()

    def grow_host(self, blocks: int) -> None:
        """Lets the first `blocks` blocks of the host pool be used."""
        if blocks > self._blocks.host_slots:
            self._blocks.grow_host(blocks)
            self._mover.store_stranded()

    def collect(self) -> None:
        """Takes in the steps that are done."""
        for batch, result in self._pipeline.collect():
            if self._outcomes.untold:
                self._collect_copies()  # among them the loads that the step waited for
            self._outcomes.take(batch, result)

    def turn(self) -> None:
        """Takes in what is done and starts what can be."""
        self.collect()
        self._collect_copies()
        self._keep_watermarks()
        self._batcher.admit()
        self._commands.retry()
        if self._pipeline.empty:
            self._batcher.admit_early(self._pipeline.is_soon)
        self.due_s = None
        while (size := self._batcher.next_size()) is not None:
            due_s = self._pipeline.due_s(size)
            if due_s is None:
                return
            if due_s > time.monotonic():
                self.due_s = due_s
                return
            if not self._launch():
                return

    def _collect_copies(self) -> None:
        self._commands.collect(self._mover.poll())
        self._outcomes.tell_started()

    def _launch(self) -> bool:
        """Launches a step; returns False if there is no room for anybody's."""
        batch = self._batcher.schedule(self._pipeline.latest)
        if batch is None:
            return False
        self._outcomes.begin(batch)
        fence = self._pipeline.launch(batch)
        self._blocks.fence = fence
        if self._mover.mode.write_through:
            filled = [block for share in batch.shares for block in share.filled]
            self._mover.write_through(filled, fence)
        return True

    def finish(self, session: Session, reason: FinishReason) -> None:
        """Ends a session's request well."""
        generated = session.generated
        request = self._leave(session)
        self._tally.requests_completed += 1
        self.outbox.append(
            Finished(
                request_id=request.request_id,
                reason=reason,
                prefilled_tokens=request.prefilled_tokens,
                completion_tokens=generated,
                context_length=len(session.tokens),
                generation=session.generation,
            )
        )
        self.tell(SessionEventKind.GENERATE_FINISHED, session)

    def fail(self, session: Session, error: DjinnError) -> None:
        """Fails a session's request, which it must have, for a reason of the engine's own."""
        self._tally.requests_failed += 1
        request = self._leave(session)
        self.outbox.append(Rejected(request.request_id, error.to_info()))
        self.tell(SessionEventKind.GENERATE_FINISHED, session)

    def _leave(self, session: Session) -> Request:
        self._batcher.remove(session)
        request = requests.end(session, self._blocks)
        del self._requests[request.request_id]
        return request

    # --- room ------------------------------------------------------------------------------------

    def _keep_watermarks(self) -> None:
        device = int(self._limits.low_watermark * self._blocks.device_slots)
        # Without offload room is made by forgetting, which is for nothing ahead of need.
        if self._mover.mode.offload and self._blocks.available_device() < device:
            self._room.make(device, self._batcher.waiting, spare_awaited=True)
        host = int(self._limits.low_watermark * self._blocks.host_slots)
        if self._blocks.free_host() < host:
            self._blocks.give_up_copies(host)

    # --- reports ---------------------------------------------------------------------------------

    def report(self) -> Report:
        """Returns how full and how fast the engine is, and starts a new interval."""
        device, host = self._blocks.pool_states()
        steps = self._pipeline.take_statistics()
        counters = Counters(
            **dataclasses.asdict(self._mover.counters),
            **dataclasses.asdict(self._tally),
            preemptions=self._batcher.preemptions,
        )
        return Report(
            device=device,
            host=host,
            counters=counters,
            running_sequences=len(self._batcher.running),
            waiting_requests=len(self._batcher.waiting),
            sessions=len(self.sessions),
            load_bytes_per_s=self._mover.load_bytes_per_s,
            prefill_tokens_per_s=self._outcomes.prefill_tokens_per_s,
            loads_in_flight=self._mover.in_flight(to_device=True),
            stores_in_flight=self._mover.in_flight(to_device=False),
            step_seconds=steps.seconds,
            step_batch_sizes=steps.batch_sizes,
            step_idle_share=steps.idle_share,
        )

    def check_integrity(self) -> None:
        """Raises `AssertionError` if the bookkeeping contradicts itself."""
        tables = [session.kv for session in self.sessions.values()]
        self._blocks.check_integrity(tables, self._mover.tickets())
        for session in self.sessions.values():
            assert session.kv.tokens <= session.length, session
            waits = session in self._batcher.waiting or session in self._batcher.running
            assert waits == (session.request is not None), session


def _closed_error(session_id: str) -> SessionClosedError:
    return SessionClosedError(
        f"session {session_id!r} was closed", metadata={"session_id": session_id}
    )
