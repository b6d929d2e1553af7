"""The engine: sessions, their requests and commands, and the step loop's turns.

Nothing here blocks. `handle` takes messages in; `turn` collects copies and the step that are done,
admits, and launches the next step; both leave what the front shall hear in `outbox`.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import OrderedDict
from typing import Protocol

import msgspec

from services.common.errors import (
    CancelledError,
    DjinnError,
    DrainingError,
    InternalError,
    SessionClosedError,
    UnknownSessionError,
)
from services.worker.engine import requests
from services.worker.engine.batcher import Batch, Batcher, Share
from services.worker.engine.block_manager import BlockManager
from services.worker.engine.commands import Commands
from services.worker.engine.kv_cache import KVCache
from services.worker.engine.kv_mover import KvMover
from services.worker.engine.sequence import Request, Session
from services.worker.engine.step import PendingStep, SampledToken, StepPlan
from services.worker.engine.streams import Stream
from services.worker.messages import (
    Abort,
    Command,
    Counters,
    Finished,
    FinishReason,
    GetSnapshot,
    Rejected,
    Report,
    SessionEvent,
    SessionEventKind,
    SessionState,
    Shutdown,
    Snapshot,
    Started,
    StopAt,
    Submit,
    ToEngine,
    ToFront,
    Tokens,
)

_log = logging.getLogger(__name__)

_CLOSED_REMEMBERED = 10_000


class StepRunner(Protocol):
    """Launches steps on the compute stream."""

    def launch(self, plan: StepPlan) -> PendingStep:
        """Launches a step without blocking."""


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


@dataclasses.dataclass(slots=True)
class _Tally:
    prefilled_tokens: int = 0
    recomputed_tokens: int = 0
    prefix_hit_tokens: int = 0
    generated_tokens: int = 0
    requests_completed: int = 0
    requests_failed: int = 0
    requests_cancelled: int = 0


class Engine:
    """All sessions of one worker.

    Args:
        mover: Moves KV; its block manager is the bookkeeping.
        runner: Launches steps on `compute`.
        compute: The stream that steps run on.
        cache: The device pool.
        limits: What the engine is built for.
    """

    def __init__(
        self,
        mover: KvMover,
        runner: StepRunner,
        compute: Stream,
        cache: KVCache,
        limits: EngineLimits,
    ) -> None:
        self.outbox: list[ToFront] = []
        self.sessions: dict[str, Session] = {}
        self.stopping = False
        self._mover = mover
        self._blocks: BlockManager = mover.blocks
        self._runner = runner
        self._limits = limits
        self._batcher = Batcher(
            mover, limits.max_running_sequences, limits.max_step_tokens, self._make_room
        )
        self._compute = compute
        self._commands = Commands(self, mover, lambda slots: cache.scrub(slots, compute))
        self._requests: dict[str, Session] = {}
        # A late Generate of theirs, which carries a token, must not make them anew.
        self._closed: OrderedDict[str, None] = OrderedDict()
        self._arrivals = 0
        self._step: tuple[Batch, PendingStep, float] | None = None
        self._step_seconds: list[float] = []
        self._step_batch_sizes: list[int] = []
        self._prefill_tokens_per_s = 0.0
        self._tally = _Tally()

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
            case GetSnapshot():
                states = [self.state_of(session) for session in self.sessions.values()]
                self.outbox.append(Snapshot(message.snapshot_id, states))
            case Shutdown():
                for session in list(self._requests.values()):
                    self.cancel(session, DrainingError("the worker stops"))
                self.stopping = True

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
            self._finish(session, FinishReason.STOP)
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
        return not self._requests and self._step is None and not self._mover.tickets()

    def grow_host(self, blocks: int) -> None:
        """Lets the first `blocks` blocks of the host pool be used."""
        if blocks > self._blocks.host_slots:
            self._blocks.grow_host(blocks)
            self._mover.store_stranded()

    def turn(self) -> None:
        """Collects what is done and starts what can be."""
        done = self._mover.poll()
        self._commands.collect(done)
        if self._step is not None and self._step[1].done():
            self._collect(*self._step)
            self._step = None
        self._commands.retry()
        self._keep_watermarks()
        self._batcher.admit()
        if self._step is None:
            self._launch()

    def _launch(self) -> None:
        batch = self._batcher.schedule()
        if batch is None:
            return
        now_ns = time.time_ns()
        launched_s = time.monotonic()
        for share in batch.shares:
            if not share.request.started:
                self._tell_started(share, now_ns)
        pending = self._runner.launch(batch.plan)
        fence = self._compute.record()
        self._blocks.fence = fence
        if self._limits.write_through:
            filled = [block for share in batch.shares for block in share.filled]
            self._mover.write_through(filled, fence)
        self._step = (batch, pending, launched_s)

    def _tell_started(self, share: Share, now_ns: int) -> None:
        session, request = share.session, share.request
        request.started = True
        request.cached_tokens = share.start
        source = session.source
        before = self._blocks.blocks_for(share.start)
        prefix_blocks = source.prefix_hit_tokens // self._blocks.block_size_tokens
        held = before - source.resident_blocks - source.loaded_blocks - prefix_blocks
        self._tally.prefix_hit_tokens += source.prefix_hit_tokens
        self.outbox.append(
            Started(
                request_id=request.request_id,
                context_length=request.prompt_length,
                cached_tokens=share.start,
                generation=session.generation,
                kv=msgspec.structs.replace(
                    source,
                    held_blocks=max(held, 0),
                    recomputed_tokens=max(session.known_tokens - share.start, 0),
                ),
                queued_ns=request.queued_ns,
                started_ns=now_ns,
            )
        )

    def _collect(self, batch: Batch, pending: PendingStep, launched_s: float) -> None:
        result = pending.result()
        seconds = time.monotonic() - launched_s
        self._step_seconds.append(seconds)
        self._step_batch_sizes.append(len(batch.shares))
        prefilled = 0
        for index, share in enumerate(batch.shares):
            if index in result.failed:
                self._fail_share(share)
            else:
                prefilled += self._take_share(share, result.samples[index])
        if prefilled:
            speed = prefilled / seconds
            past = self._prefill_tokens_per_s
            self._prefill_tokens_per_s = 0.8 * past + 0.2 * speed if past else speed

    def _fail_share(self, share: Share) -> None:
        """Fails a request whose logits are not numbers, and forgets the KV that they come from."""
        session = share.session
        if session.request is not share.request:
            return
        self._mover.discard(session)
        self._tally.requests_failed += 1
        message = f"the logits after {share.start + share.count} tokens are not numbers"
        _log.error("session %s: %s", session.session_id, message)
        request = self._leave(session)
        self.outbox.append(Rejected(request.request_id, InternalError(message).to_info()))
        self.tell(SessionEventKind.GENERATE_FINISHED, session)

    def _take_share(self, share: Share, sample: SampledToken | None) -> int:
        """Takes in one session's part of a step; returns how many prompt tokens it computed."""
        session, request = share.session, share.request
        end = share.start + share.count
        prompt_tokens = max(0, min(end, request.prompt_length) - share.start)
        self._tally.prefilled_tokens += prompt_tokens
        self._tally.recomputed_tokens += max(0, min(end, session.known_tokens) - share.start)
        request.prefilled_tokens += prompt_tokens
        if session.request is not request:
            return prompt_tokens  # cancelled or closed while the step ran
        self._publish(session, share.start, end)
        session.known_tokens = max(session.known_tokens, end)
        if sample is not None and end == len(session.tokens):
            self._tally.generated_tokens += 1
            reason = requests.accept_token(session, sample.token_id)
            self.outbox.append(
                Tokens(
                    request_id=request.request_id,
                    token_ids=[sample.token_id],
                    logprobs=[] if sample.logprobs is None else [sample.logprobs],
                    logits=[] if sample.logits is None else [sample.logits],
                )
            )
            if reason is not None:
                self._finish(session, reason)
        return prompt_tokens

    def _publish(self, session: Session, start: int, end: int) -> None:
        size = self._blocks.block_size_tokens
        first, last = start // size, end // size
        if first == last:
            return
        hashes = session.block_hashes(size)
        for index in range(first, last):
            self._blocks.publish(session.kv, index, hashes[index])

    def _finish(self, session: Session, reason: FinishReason) -> None:
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

    def _leave(self, session: Session) -> Request:
        self._batcher.remove(session)
        request = requests.end(session)
        del self._requests[request.request_id]
        return request

    # --- room ------------------------------------------------------------------------------------

    def make_room_for(self, session: Session) -> None:
        """Works towards room on the device for one session's blocks."""
        self._make_room(self._blocks.room_needed(session.kv))

    def _make_room(self, want_blocks: int) -> None:
        evicted, dropped = self._mover.make_room(
            want_blocks, self.sessions.values(), self._batcher.waiting
        )
        for session in evicted:
            self.tell(SessionEventKind.EVICTED, session)
        for session in dropped:
            self.tell(SessionEventKind.DROPPED, session)

    def _keep_watermarks(self) -> None:
        device = int(self._limits.low_watermark * self._blocks.device_slots)
        if self._blocks.available_device() < device:
            self._make_room(device)
        host = int(self._limits.low_watermark * self._blocks.host_slots)
        if self._blocks.free_host() < host:
            self._blocks.give_up_copies(host)

    # --- reports ---------------------------------------------------------------------------------

    def report(self) -> Report:
        """Returns how full and how fast the engine is, and starts a new interval."""
        device, host = self._blocks.pool_states()
        counters = Counters(
            **dataclasses.asdict(self._mover.counters),
            **dataclasses.asdict(self._tally),
            preemptions=self._batcher.preemptions,
        )
        report = Report(
            device=device,
            host=host,
            counters=counters,
            running_sequences=len(self._batcher.running),
            waiting_requests=len(self._batcher.waiting),
            sessions=len(self.sessions),
            load_bytes_per_s=self._mover.load_bytes_per_s,
            prefill_tokens_per_s=self._prefill_tokens_per_s,
            loads_in_flight=self._mover.in_flight(to_device=True),
            stores_in_flight=self._mover.in_flight(to_device=False),
            step_seconds=self._step_seconds,
            step_batch_sizes=self._step_batch_sizes,
        )
        self._step_seconds, self._step_batch_sizes = [], []
        return report

    def check_integrity(self) -> None:
        """Raises `AssertionError` if the bookkeeping contradicts itself."""
        tables = [session.kv for session in self.sessions.values()]
        self._blocks.check_integrity(tables, self._mover.tickets())
        for session in self.sessions.values():
            assert session.kv.tokens <= len(session.tokens), session
            waits = session in self._batcher.waiting or session in self._batcher.running
            assert waits == (session.request is not None), session


def _closed_error(session_id: str) -> SessionClosedError:
    return SessionClosedError(
        f"session {session_id!r} was closed", metadata={"session_id": session_id}
    )
