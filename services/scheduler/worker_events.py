"""What happens on the workers' side: they connect, say what they hold, answer, and are lost."""

from __future__ import annotations

import logging

from services.common.errors import InvalidRequestError
from services.common.session_token import SessionToken
from services.scheduler import record
from services.scheduler.dispatcher import Dispatcher
from services.scheduler.domain import (
    MOVES,
    Close,
    CommandResult,
    EventKind,
    Hello,
    Open,
    Phase,
    Prefetch,
    Report,
    SessionEvent,
    SessionSnapshot,
)
from services.scheduler.policy.base import Cause
from services.scheduler.predictor import Predictor
from services.scheduler.reconciler import InFlight, failed
from services.scheduler.registry import Link, WorkerState
from services.scheduler.session import Session

_logger = logging.getLogger(__name__)

_CAUSES = {
    EventKind.GENERATE_STARTED: Cause.GENERATE_STARTED,
    EventKind.GENERATE_FINISHED: Cause.GENERATE_FINISHED,
    EventKind.EVICTED: Cause.MOVED,
    EventKind.RESTORED: Cause.MOVED,
    EventKind.DROPPED: Cause.MOVED,
}

# Where the client has sent a Generate is where its session is, whatever was planned.
_PLACING = {EventKind.CREATED, EventKind.GENERATE_STARTED}


class WorkerEvents:
    """Takes in what workers say and keeps the sessions true to it."""

    def __init__(self, dispatcher: Dispatcher, predictor: Predictor) -> None:
        self._do = dispatcher
        self._predictor = predictor
        self._store = dispatcher.store
        self._registry = dispatcher.registry
        self._reconciler = dispatcher.reconciler

    def connected(self, hello: Hello, link: Link, now_s: float) -> WorkerState:
        """Takes in a worker's Hello: after it, what the worker holds is what its snapshot says."""
        worker, same = self._registry.connect(hello, link, now_s)
        pending = self._reconciler.of_worker(hello.worker_id)
        if not same:
            for entry in pending:
                self._fail(entry, "UNAVAILABLE", "UNAVAILABLE", "the worker has been started anew")
        held = {snapshot.session_id for snapshot in hello.snapshot}
        for session_id in worker.sessions - held:
            session = self._store.get(session_id)
            if session is not None:
                opening = same and session.opening
                session.forget_place()
                session.opening = opening
        if same:
            self._resend(worker, pending, held, now_s)
        adopted = [self._adopt(worker, snapshot, now_s) for snapshot in hello.snapshot]
        for session in adopted:
            if session is not None and not session.move_id:
                if session.kv.total_blocks and not session.kv.resident and not session.generating:
                    self._do.whereabouts.found_away(session)
                self._do.decide(session, Cause.RECONNECTED, now_s)
        return worker

    def lost(self, worker_id: str, link: Link, now_s: float) -> None:
        """Takes in that a worker's stream has ended; its sessions and commands wait for it."""
        self._registry.lose(worker_id, link, now_s)

    def heard(self, worker: WorkerState, now_s: float) -> None:
        """Takes in that a worker lives."""
        worker.heard_s = now_s

    def reported(self, worker: WorkerState, report: Report) -> None:
        """Takes in a worker's report, which came at its `heard_s`, and what it gives room for."""
        self._registry.report(worker, report)
        worker_id = worker.hello.worker_id
        self._do.relieve(worker_id, worker.heard_s)
        self._do.fill(worker_id, worker.heard_s)

    def happened(self, worker: WorkerState, event: SessionEvent, now_s: float) -> None:
        """Takes in that a session has changed on its worker's own account."""
        snapshot = event.session
        session = self._store.get(snapshot.session_id)
        if session is None or session.worker_id != worker.hello.worker_id:
            session = self._adopt(worker, snapshot, now_s, take=event.kind in _PLACING)
            if session is None:
                return
        self._learn(worker, session, event, now_s)
        session.observe(snapshot)
        if event.kind is EventKind.GENERATE_FINISHED:
            session.failures = 0
            if session.last_generate_s is None:
                session.last_generate_s = now_s
        cause = _CAUSES.get(event.kind)
        if cause is not None:
            self._do.decide(session, cause, now_s)

    def _learn(
        self, worker: WorkerState, session: Session, event: SessionEvent, now_s: float
    ) -> None:
        """Takes in what an event says of prefetches, of a silent client, and of the prompts."""
        whereabouts = self._do.whereabouts
        silent = session.phase is Phase.OPEN
        match event.kind:
            case EventKind.GENERATE_STARTED:
                if session.last_generate_s is None:
                    worker.prompts.started(session.session_id, event.session.context_length)
                    self._registry.changed(worker)
                else:
                    worker.prompts.started(session.session_id)
                if silent and session.last_generate_s is not None:
                    silence_s = now_s - session.last_generate_s
                    self._predictor.learn_silence(silence_s, session.forecast)
                    session.forecast = session.expected_wake_s = None
                if session.prefetched:
                    whereabouts.woke(session)
                    session.prefetched = False
                whereabouts.taken_back(session)
            case EventKind.GENERATE_FINISHED:
                if silent:
                    session.forecast = self._predictor.predict_silence(now_s)
                if worker.prompts.end(session.session_id):
                    self._registry.changed(worker)
            case EventKind.EVICTED:
                whereabouts.let_go(session, now_s)
            case EventKind.RESTORED | EventKind.DROPPED:
                whereabouts.taken_back(session)
            case _:
                pass

    def ended(self, result: CommandResult, now_s: float) -> None:
        """Takes in how a command ended; one that is not in flight changes nothing."""
        entry = self._reconciler.end(result)
        if entry is None:
            return
        session = self._store.get(result.session_id)
        if session is None or session.worker_id != entry.worker_id:
            return
        action = entry.command.action
        if isinstance(action, Open):
            session.opening = False
        if result.reason == "SESSION_UNKNOWN":
            if not isinstance(action, Close):
                session.forget_place()
            return
        if result.ok:
            session.known = True
        # A command refused before the engine saw it comes back without a generation, and then
        # says nothing of the session.
        if result.kv is not None and session.known and (result.ok or result.generation):
            session.kv = result.kv
        if isinstance(action, MOVES):
            self._moved(session, entry, result, now_s)
        else:
            session.generation = max(session.generation, result.generation)
        if isinstance(action, Prefetch):
            self._do.whereabouts.prefetches.loaded_bytes += result.moved_bytes
            self._do.fill(entry.worker_id, now_s)

    def overdue(self, entry: InFlight, now_s: float) -> None:
        """Sends a command again that was not answered in time, if it still matters."""
        worker = self._registry.connected(entry.worker_id)
        if not self._matters(entry):
            self.give_up(entry, now_s)
            return
        command = self._reconciler.renew(entry, now_s)
        if worker is not None and worker.link is not None:
            worker.link.send(command, None)

    def give_up(self, entry: InFlight, now_s: float) -> None:
        """Ends a command that was sent as often as it may be and never answered."""
        text = f"worker {entry.worker_id!r} did not answer in {entry.attempts} attempts"
        if self._matters(entry) and self._registry.connected(entry.worker_id) is not None:
            _logger.warning("command %s: %s", entry.command.command_id, text)
        self.ended(failed(entry, "DEADLINE_EXCEEDED", "COMMAND_TIMEOUT", text), now_s)

    def _moved(
        self, session: Session, entry: InFlight, result: CommandResult, now_s: float
    ) -> None:
        asked = entry.command.expected_generation
        stale = result.reason == "STALE_GENERATION" and result.generation != asked
        session.generation = max(session.generation, result.generation)
        if session.move_id != result.command_id:
            return
        session.move_id = ""
        if result.ok:
            session.failures = 0
            return
        self._do.whereabouts.refused(session, entry.command.action, result.reason)
        if isinstance(entry.command.action, Prefetch) and result.reason == "EXHAUSTED":
            # Not its fault: it comes as soon as there is room.
            return
        _logger.debug(
            "%s of %s: %s", type(entry.command.action).__name__, session.session_id, result.message
        )
        session.failures += 1
        cause = Cause.STALE if stale else Cause.MOVE_FAILED
        self._do.decide(session, cause, now_s, traceparent=entry.command.traceparent)

    def _adopt(
        self, worker: WorkerState, snapshot: SessionSnapshot, now_s: float, take: bool = False
    ) -> Session | None:
        """Makes a worker's session known to the scheduler.

        Args:
            worker: Who holds it.
            snapshot: What it holds.
            now_s: The time.
            take: The session is there, even if another worker was chosen for it.

        Returns:
            The session; None if the worker shall not hold it and was told so.
        """
        session_id = snapshot.session_id
        if self._store.is_closed(session_id):
            if not self._reconciler.is_closing(worker.hello.worker_id, session_id):
                self._do.send_close(worker, session_id, now_s)
            return None
        session = self._store.get(session_id)
        if session is None:
            session = _revive(snapshot, now_s)
            self._store.add(session)
        elif not take and self._held_elsewhere(session, worker):
            self._do.send_close(worker, session_id, now_s)
            return None
        else:
            told = record.decode(snapshot.record)
            before = session.phase
            if told is not None and record.merge(session, told):
                self._store.recount(session, before)
        if session.worker_id != worker.hello.worker_id:
            previous = self._registry.connected(session.worker_id)
            held_before = session.known or session.opening
            self._do.move(session, worker)
            if previous is not None and held_before:
                self._do.send_close(previous, session_id, now_s)
        elif session_id not in worker.sessions:
            self._registry.assign(worker, session_id)
        session.opening = False
        session.observe(snapshot)
        if session.move_id and self._reconciler.get(session.move_id) is None:
            session.move_id = ""
        return session

    def _held_elsewhere(self, session: Session, worker: WorkerState) -> bool:
        if session.worker_id == worker.hello.worker_id:
            return False
        home = self._registry.connected(session.worker_id)
        # One that was only opened there, and never ran, is better off where its context is.
        ran = session.generating or session.context_length > 0
        return home is not None and session.known and ran

    def _resend(
        self, worker: WorkerState, pending: list[InFlight], held: set[str], now_s: float
    ) -> None:
        for entry in pending:
            opened = isinstance(entry.command.action, Open) and entry.command.session_id in held
            if self._matters(entry) and not opened:
                if worker.link is not None:
                    worker.link.send(self._reconciler.renew(entry, now_s), None)
            else:
                self._reconciler.end(failed(entry, "ABORTED", "SUPERSEDED", "no longer wanted"))

    def _matters(self, entry: InFlight) -> bool:
        command = entry.command
        if entry.on_done is not None or isinstance(command.action, Close):
            return True
        session = self._store.get(command.session_id)
        if session is None or entry.superseded or session.worker_id != entry.worker_id:
            return False
        return not isinstance(command.action, MOVES) or session.move_id == command.command_id

    def _fail(self, entry: InFlight, code: str, reason: str, message: str) -> None:
        self._reconciler.end(failed(entry, code, reason, message))
        session = self._store.get(entry.command.session_id)
        if session is not None and session.move_id == entry.command.command_id:
            session.move_id = ""


def _revive(snapshot: SessionSnapshot, now_s: float) -> Session:
    """Returns the session that a snapshot is of, from whatever its record tells."""
    told = record.decode(snapshot.record)
    if told is not None:
        return record.revive(snapshot.session_id, told)
    # A worker that made the session from a client's token has only that for a record.
    try:
        return from_token(SessionToken.decode(snapshot.record), now_s)
    except InvalidRequestError:
        return Session(
            session_id=snapshot.session_id,
            tenant_id="",
            name="",
            priority=0,
            cache_salt="",
            model="",
            opened_s=now_s,
        )


def from_token(token: SessionToken, now_s: float) -> Session:
    """Returns the session that a token describes, not yet placed."""
    return Session(
        session_id=token.session_id,
        tenant_id=token.tenant_id,
        name=token.name,
        priority=token.priority,
        cache_salt=token.cache_salt,
        model="",
        opened_s=token.opened_unix_ns / 1e9 or now_s,
    )
