"""Asks the policy about one session and carries out what it says.

Shared by the two sides that things happen on: clients' (`coordinator`) and workers'
(`worker_events`). Everything is synchronous, and time is passed in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from services.common.errors import NoWorkerError, UnsupportedError
from services.scheduler import record
from services.scheduler.domain import (
    MOVES,
    Action,
    Close,
    Command,
    Drop,
    Evict,
    Open,
    Phase,
    Prefetch,
    name_of,
)
from services.scheduler.placement import candidates, expected_blocks, roomiest
from services.scheduler.policy.base import Cause, Decision, Policy, PolicyCommand
from services.scheduler.policy.view import SessionView, SystemView, WorkerView
from services.scheduler.reconciler import OnDone, Reconciler
from services.scheduler.registry import Registry, WorkerState
from services.scheduler.session import Session
from services.scheduler.store import SessionStore
from services.scheduler.timers import Timers
from services.scheduler.whereabouts import Whereabouts

# What must not be done to a session that has moved on since it was decided. To restore one that
# has is harmless, and to refuse it would cost a wake.
_GUARDED = (Evict, Prefetch, Drop)


class Dispatcher:
    """The sessions, the workers and the policy, and the ways from one to the other.

    Args:
        store: All sessions.
        registry: All workers.
        reconciler: Commands in flight.
        policy: What decides.
        start_s: When this scheduler started.
        worker_grace_s: How long a session waits for its own worker before another may take it.

    Attributes:
        reviews: When to ask about which session again.
        whereabouts: Who is away, and who is wanted back.
        system: All of it as a policy sees it.
    """

    def __init__(
        self,
        store: SessionStore,
        registry: Registry,
        reconciler: Reconciler,
        policy: Policy,
        *,
        start_s: float,
        worker_grace_s: float,
    ) -> None:
        self.store = store
        self.registry = registry
        self.reconciler = reconciler
        self.policy = policy
        self.reviews = Timers()
        self.whereabouts = Whereabouts(registry)
        self._start_s = start_s
        self._worker_grace_s = worker_grace_s
        self.system = SystemView(registry.views, _SessionViews(self))

    # --- deciding ---

    def decide(
        self,
        session: Session,
        cause: Cause,
        now_s: float,
        *,
        traceparent: str = "",
        caused_s: float | None = None,
    ) -> Decision:
        """Asks the policy about a session and carries out its decision.

        Args:
            session: An open session.
            cause: What has happened to it.
            now_s: The time.
            traceparent: Trace context for the commands; empty: that of the signal whose command
                was put off, if any.
            caused_s: When the signal that is the cause was received; None: no signal is.

        Returns:
            The decision.
        """
        traceparent = traceparent or session.deferred_trace
        decision = self.policy.decide(cause, self.view(session), self.system, now_s)
        session.deferred_trace = traceparent if decision.deferred else ""
        session.reason = decision.reason or session.reason
        if decision.review_at_s is None:
            self.reviews.cancel(session.session_id)
        else:
            self.reviews.set(session.session_id, decision.review_at_s)
        self._carry_out(decision.commands, now_s, traceparent, caused_s)
        if decision.wants_prefetch:
            self.whereabouts.want(session)
            self.fill(session.worker_id, now_s)
        else:
            self.whereabouts.wanting.remove(session.session_id)
        return decision

    def fill(self, worker_id: str, now_s: float) -> None:
        """Brings back to a worker what waits for that and finds room."""
        worker = self.registry.views.get(worker_id)
        if worker is not None:
            self._carry_out(self.policy.fill(worker, self.system), now_s)

    def relieve(self, worker_id: str, now_s: float) -> None:
        """Has the policy look at a worker that has reported how full it is."""
        worker = self.registry.views.get(worker_id)
        if worker is not None:
            self._carry_out(self.policy.relieve(worker, self.system, now_s), now_s)

    def _carry_out(
        self,
        commands: Iterable[PolicyCommand],
        now_s: float,
        traceparent: str = "",
        caused_s: float | None = None,
    ) -> None:
        for wanted in commands:
            session = self.store.get(wanted.session_id)
            if session is not None:
                session.reason = wanted.reason
                self.send(session, wanted.action, now_s, traceparent=traceparent, caused_s=caused_s)

    def forget(self, session_id: str) -> None:
        """Forgets all that is planned for a session."""
        self.reviews.cancel(session_id)
        self.whereabouts.forget(session_id)

    def view(self, session: Session) -> SessionView:
        """Returns a session as a policy sees it."""
        move = self.reconciler.get(session.move_id) if session.move_id else None
        worker = self.registry.connected(session.worker_id)
        return SessionView(
            session_id=session.session_id,
            tenant_id=session.tenant_id,
            priority=session.priority,
            phase=session.phase,
            phase_since_s=session.phase_since_s,
            tool_name=session.tool_name,
            expected_wake_s=session.expected_wake_s,
            worker_id=session.worker_id,
            connected=worker is not None and session.known,
            generating=session.generating,
            context_length=session.context_length,
            last_active_s=max(session.last_generate_s or 0.0, session.signalled_s),
            moving=name_of(move.command.action) if move else "",
            kv=session.kv,
            failures=session.failures,
            forecast=session.forecast,
            evicted_s=session.evicted_s,
            prefetched=session.prefetched,
        )

    # --- commands ---

    def send(
        self,
        session: Session,
        action: Action,
        now_s: float,
        *,
        traceparent: str = "",
        caused_s: float | None = None,
        guarded: bool = True,
        on_done: OnDone | None = None,
    ) -> Command | None:
        """Sends a command about a session to its worker.

        One that moves the session's KV supersedes the one before it.

        Args:
            session: An open session.
            action: What to do.
            now_s: The time.
            traceparent: Trace context of the cause.
            caused_s: When the signal that caused it was received; None: no signal did.
            guarded: Have the worker refuse it if the session has moved on.
            on_done: Told once how it ended.

        Returns:
            The command; None if the session's worker is not connected.
        """
        worker = self.registry.connected(session.worker_id)
        if worker is None:
            return None
        self.whereabouts.commanded(session, worker, action, now_s)
        guard = guarded and isinstance(action, _GUARDED)
        command = self.reconciler.begin(
            session.worker_id,
            session.session_id,
            action,
            now_s,
            generation=session.generation if guard else None,
            traceparent=traceparent,
            record=record.encode(session),
            on_done=on_done,
        )
        if isinstance(action, MOVES):
            if session.move_id:
                self.reconciler.supersede(session.move_id)
            session.move_id = command.command_id
        _transmit(worker, command, caused_s)
        return command

    def send_close(self, worker: WorkerState, session_id: str, now_s: float) -> None:
        """Has a connected worker end a session that is not, or no longer, its own."""
        command = self.reconciler.begin(worker.hello.worker_id, session_id, Close(), now_s)
        _transmit(worker, command, None)

    # --- places ---

    def ensure_placed(self, session: Session, now_s: float, expected_tokens: int = 0) -> None:
        """Places a session that has no worker, or whose worker is lost, if one can be found.

        Its worker, if it is connected but does not know the session, is told of it.
        """
        home = self.registry.connected(session.worker_id)
        if home is not None:
            if session.session_id not in home.sessions:
                self.registry.assign(home, session.session_id)
            self._make_known(session, now_s)
            return
        if session.worker_id and now_s < self._lost_s(session) + self._worker_grace_s:
            return
        try:
            self.place(session, now_s, expected_tokens)
        except (NoWorkerError, UnsupportedError):
            # Its place is kept: its own worker may be the first to come back.
            return

    def candidates(self, model: str) -> list[WorkerView]:
        """Returns the workers on which a session could be placed.

        Args:
            model: The model wanted; empty: any.

        Raises:
            NoWorkerError: There is none now.
            UnsupportedError: None of those connected serves the model.
        """
        lost_models = {w.hello.model.model for w in self.registry if w.link is None}
        return candidates(self.registry.views.values(), model, lost_models=lost_models)

    def place(self, session: Session, now_s: float, expected_tokens: int = 0) -> None:
        """Places a session on the worker with the most room and tells that worker.

        Of several, one that the policy has room on is taken.

        Raises:
            NoWorkerError: There is none now.
            UnsupportedError: None of those connected serves the session's model.
        """
        tokens = expected_tokens or session.context_length
        serving = self.candidates(session.model)
        roomy = [worker for worker in serving if self.policy.room(worker).sessions >= 1]
        chosen = roomiest(roomy or serving, tokens)
        worker = self.registry.require(chosen.worker_id)
        self.move(session, worker, expected_blocks(chosen, tokens))
        self._make_known(session, now_s)

    def move(self, session: Session, worker: WorkerState, blocks: int = 0) -> None:
        """Notes that a session is on another worker, of which nothing more is known."""
        if session.worker_id != worker.hello.worker_id:
            self.unplace(session)
        self.registry.assign(worker, session.session_id, blocks)
        session.worker_id = worker.hello.worker_id

    def unplace(self, session: Session) -> None:
        """Notes that a session is on no worker."""
        if session.move_id:
            self.reconciler.supersede(session.move_id)
        if session.worker_id:
            self.registry.unassign(session.worker_id, session.session_id)
        self.forget(session.session_id)
        session.forget_place()
        session.worker_id = ""

    def endpoint(self, session: Session) -> str:
        """Returns where the session's Generate goes; empty: its worker is not connected."""
        worker = self.registry.connected(session.worker_id)
        return worker.hello.endpoint if worker else ""

    def _make_known(self, session: Session, now_s: float) -> None:
        if session.known or session.opening:
            return
        session.opening = True
        self.send(session, Open(session.cache_salt, session.priority), now_s)

    def _lost_s(self, session: Session) -> float:
        worker = self.registry.get(session.worker_id)
        # One never seen is the worker of a session token or of a record: it had been there before
        # this scheduler was.
        return worker.lost_s if worker is not None else self._start_s


class _SessionViews:
    """The open sessions as a policy sees them."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    def get(self, session_id: str) -> SessionView | None:
        session = self._dispatcher.store.get(session_id)
        return self._dispatcher.view(session) if session is not None else None

    def in_phase(self, phase: Phase) -> Iterator[SessionView]:
        for session in self._dispatcher.store:
            if session.phase is phase:
                yield self._dispatcher.view(session)

    def count(self, phase: Phase) -> int:
        return self._dispatcher.store.count(phase)

    def away(self, worker_id: str) -> Iterator[SessionView]:
        return self._views(self._dispatcher.whereabouts.away.furthest(worker_id))

    def wanting(self, worker_id: str) -> Iterator[SessionView]:
        return self._views(self._dispatcher.whereabouts.wanting.nearest(worker_id))

    def middle_wake_s(self, worker_id: str) -> float | None:
        return self._dispatcher.whereabouts.away.middle_s(worker_id)

    def prefetching(self, worker_id: str) -> int:
        return self._dispatcher.reconciler.prefetching(worker_id)

    def _views(self, session_ids: Iterable[str]) -> Iterator[SessionView]:
        for session_id in session_ids:
            session = self._dispatcher.store.get(session_id)
            if session is not None:
                yield self._dispatcher.view(session)


def _transmit(worker: WorkerState, command: Command, caused_s: float | None) -> None:
    if worker.link is not None:
        worker.link.send(command, caused_s)
