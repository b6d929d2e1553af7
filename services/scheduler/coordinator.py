"""The scheduler itself, without a network and without a clock.

Everything is synchronous: a call takes in one thing that happened at `now_s`, and whatever
commands follow are handed to the workers' links before it returns. The service drives it from an
event loop, a simulator from a queue of events in virtual time.
"""

from __future__ import annotations

import logging
import uuid
from dataclasses import dataclass, replace

from services.common.errors import (
    DrainingError,
    InvalidRequestError,
    NoWorkerError,
    SessionExistsError,
    UnknownSessionError,
)
from services.common.session_token import SessionToken
from services.scheduler.admission import Admission, Applicant, Limits
from services.scheduler.config import SchedulerConfig
from services.scheduler.dispatcher import Dispatcher
from services.scheduler.domain import Action, Phase
from services.scheduler.forecast import WakeForecast
from services.scheduler.policy.base import Cause, Decision, Policy, make_policy
from services.scheduler.policy.explanation import Explanation
from services.scheduler.predictor import Predictor
from services.scheduler.reconciler import OnDone, Reconciler
from services.scheduler.registry import Registry, WorkerState
from services.scheduler.session import Session, Signal, Transition
from services.scheduler.store import SessionStore
from services.scheduler.timers import Timers
from services.scheduler.worker_events import WorkerEvents, from_token

_logger = logging.getLogger(__name__)

_TICK = "tick"
# Lost workers without sessions are kept this long, in case they come back.
_FORGET_WORKER_S = 600.0


@dataclass(frozen=True, slots=True)
class OpenRequest:
    """What OpenSession asks for.

    Attributes:
        session_id: The id wished for; None: any.
        model: Empty: any worker's.
        expected_tokens: Of the first prompt; 0: unknown.
    """

    session_id: str | None = None
    name: str = ""
    tenant_id: str = ""
    priority: int = 0
    model: str = ""
    expected_tokens: int = 0


@dataclass(frozen=True, slots=True)
class SignalOutcome:
    """What a signal led to.

    Attributes:
        endpoint: Where the next Generate goes; empty: no worker is connected.
        decision: What the policy said; None: it was not asked.
        forecast: When the tool call is expected to end; None: not IO_WAIT, or no idea.
    """

    session: Session
    transition: Transition
    endpoint: str
    decision: Decision | None = None
    forecast: WakeForecast | None = None


class Coordinator:
    """Sessions, workers, policy and commands, as one.

    Args:
        config: How to run.
        start_s: The time.
        epoch: Names this scheduler process; None: made up.
        policy: What decides; None: the one that `config` names.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        start_s: float,
        *,
        epoch: str | None = None,
        policy: Policy | None = None,
    ) -> None:
        self.config = config
        self.epoch = epoch or uuid.uuid4().hex
        self.start_s = start_s
        options = replace(config.policy_options, idle_threshold_s=config.idle_threshold_s)
        self.policy = policy or make_policy(config.policy, options)
        self.predictor = Predictor()
        self.store = SessionStore(
            config.closed_sessions_kept,
            config.closed_session_ttl_s,
            config.session_ttl_s,
            start_s,
        )
        self.registry = Registry()
        self.reconciler = Reconciler(
            self.epoch[:12], config.command_timeout_s, config.command_attempts
        )
        self.dispatcher = Dispatcher(
            self.store,
            self.registry,
            self.reconciler,
            self.policy,
            start_s=start_s,
            worker_grace_s=config.worker_grace_s,
        )
        self.workers = WorkerEvents(self.dispatcher, self.predictor)
        limits = Limits(
            config.max_sessions, config.tenant_quotas, config.max_queued, config.priority_aging_s
        )
        self.admission = Admission(limits, self.store.__len__, self.store.count_tenant)
        self.draining = False
        self._clock = Timers()
        self._clock.set(_TICK, start_s + config.tick_interval_s)

    # --- clients ---

    def open_session(self, request: OpenRequest, now_s: float) -> Session:
        """Opens a session, or returns the one that is open under its id.

        Raises:
            DrainingError: The scheduler is about to stop.
            ExhaustedError: No more are admitted now.
            NoWorkerError: No worker could hold it now.
            SessionClosedError: A session of this id has ended.
            SessionExistsError: The id is another tenant's.
            UnsupportedError: None of the workers connected serves the model.
        """
        session_id = request.session_id or f"s-{uuid.uuid4().hex}"
        session = self.store.get(session_id)
        if session is not None:
            if session.tenant_id != request.tenant_id:
                raise SessionExistsError(
                    f"session {session_id!r} is another tenant's",
                    metadata={"session_id": session_id},
                )
            self.dispatcher.ensure_placed(session, now_s)
            return session
        if self.store.is_closed(session_id):
            raise self.store.closed_error(session_id)
        if self.draining:
            raise DrainingError("the scheduler is about to stop", retry_after_s=1.0)
        self._admit(session_id, request, now_s)
        session = Session(
            session_id=session_id,
            tenant_id=request.tenant_id,
            name=request.name,
            priority=request.priority,
            # Unlike a name made up here, the tenant's own is the same after a restart.
            cache_salt=request.tenant_id,
            model=request.model,
            opened_s=now_s,
        )
        self.dispatcher.place(session, now_s, request.expected_tokens)
        self.store.add(session)
        self._expect_prompt(session, request.expected_tokens, now_s)
        return session

    def _admit(self, session_id: str, request: OpenRequest, now_s: float) -> None:
        serving = self.dispatcher.candidates(request.model)
        applicant = Applicant(
            session_id,
            request.tenant_id,
            request.priority,
            request.model,
            request.expected_tokens or self.registry.typical_prompt_tokens(),
        )
        self.admission.admit(applicant, [self.policy.room(worker) for worker in serving], now_s)

    def signal(
        self,
        session_id: str,
        signal: Signal,
        now_s: float,
        *,
        token: bytes = b"",
        traceparent: str = "",
        received_s: float | None = None,
    ) -> SignalOutcome:
        """Takes in what a client says of its session and acts on it at once.

        Args:
            session_id: The session.
            signal: What was said.
            now_s: The time.
            token: The session's token, from which an unknown session is made; empty: none.
            traceparent: Trace context for the commands that follow.
            received_s: When the signal was received; None: now.

        Raises:
            InvalidRequestError: The token is not one, or another session's.
            SessionClosedError: The session has ended.
            UnknownSessionError: It is not known and there is no token.
        """
        session = self._find(session_id, token, now_s)
        forecast, prefetched = session.forecast, session.prefetched
        transition = self.store.apply(session, signal, now_s)
        self.dispatcher.ensure_placed(session, now_s)
        endpoint = self.dispatcher.endpoint(session)
        if not transition.applied:
            return SignalOutcome(session, transition, endpoint)
        session.failures = 0
        if transition.waited is not None:
            self.predictor.learn(transition.waited, forecast, session.pace)
        if session.phase is Phase.IO_WAIT:
            session.forecast = self._predict(session)
            if session.forecast is not None:
                session.expected_wake_s = session.forecast.wake_s(0.5, now_s)
        else:
            self._wakes(session, prefetched, now_s)
        decision = None
        if self.policy.uses_signals:
            decision = self.dispatcher.decide(
                session,
                Cause.SIGNAL,
                now_s,
                traceparent=traceparent,
                caused_s=now_s if received_s is None else received_s,
            )
        return SignalOutcome(session, transition, endpoint, decision, session.forecast)

    def _predict(self, session: Session) -> WakeForecast | None:
        """Returns when the tool call that a session waits for ends, from all that is known now."""
        return self.predictor.predict(
            session.tool_name, session.expected_s, session.phase_since_s, session.pace
        )

    def _wakes(self, session: Session, prefetched: bool, now_s: float) -> None:
        """Takes in that a session is about to compute."""
        if prefetched:
            self.dispatcher.whereabouts.woke(session)
        # The last token of a generation never has KV: that is no prompt.
        if session.kv.missing_tokens > 1:
            self._expect_prompt(session, session.kv.missing_tokens, now_s)

    def _expect_prompt(self, session: Session, tokens: int, now_s: float) -> None:
        """Notes that a session's worker will have a prompt to compute; 0 tokens: unknown length."""
        worker = self.registry.connected(session.worker_id)
        if worker is not None:
            worker.prompts.begin(session.session_id, tokens or worker.prompts.typical_tokens, now_s)
            self.registry.changed(worker)

    def close_session(self, session_id: str, now_s: float, *, expired: bool = False) -> None:
        """Ends a session; one that is not known is remembered as ended all the same."""
        session = self.store.close(session_id, now_s, expired=expired)
        if session is None:
            return
        worker = self.registry.connected(session.worker_id)
        if worker is not None:
            self.dispatcher.send_close(worker, session_id, now_s)
        self.dispatcher.unplace(session)
        self.dispatcher.forget(session_id)

    def get_session(self, session_id: str, now_s: float) -> Session:
        """Returns a session, after placing it anew if its worker is lost.

        Raises:
            UnknownSessionError: There is no open session of this id.
        """
        session = self.store.get(session_id)
        if session is None:
            raise UnknownSessionError.of(session_id)
        self.dispatcher.ensure_placed(session, now_s)
        return session

    def token(self, session: Session) -> bytes:
        """Returns what a client carries so that its session survives this process."""
        return SessionToken(
            session_id=session.session_id,
            tenant_id=session.tenant_id,
            cache_salt=session.cache_salt,
            priority=session.priority,
            name=session.name,
            worker_id=session.worker_id,
            opened_unix_ns=int(session.opened_s * 1e9),
        ).encode()

    # --- operators ---

    def command(
        self,
        session_id: str,
        action: Action,
        on_done: OnDone,
        now_s: float,
        *,
        traceparent: str = "",
    ) -> str:
        """Sends a command about a session, whatever the policy thinks.

        Args:
            session_id: The session.
            action: What to do.
            on_done: Told once how it ended.
            now_s: The time.
            traceparent: Trace context for the command.

        Returns:
            The command's id.

        Raises:
            NoWorkerError: The session's worker is not connected.
            UnknownSessionError: There is no open session of this id.
        """
        session = self.get_session(session_id, now_s)
        command = self.dispatcher.send(
            session, action, now_s, traceparent=traceparent, guarded=False, on_done=on_done
        )
        if command is None:
            raise NoWorkerError(
                f"the worker of session {session_id!r} is not connected", retry_after_s=1.0
            )
        return command.command_id

    def explain(self, session: Session, now_s: float) -> Explanation | None:
        """Returns the numbers behind what is done about a session; None: there are none."""
        view = self.dispatcher.view(session)
        return self.policy.explain(view, self.dispatcher.system, now_s)

    def drain_worker(self, worker_id: str, drained: bool) -> WorkerState:
        """Stops placing sessions on a worker, or starts again.

        Raises:
            UnknownWorkerError: It is not connected.
        """
        worker = self.registry.require(worker_id)
        worker.drained = drained
        self.registry.changed(worker)
        return worker

    # --- time ---

    def next_due_s(self) -> float:
        """Returns when `advance` is to be called next, unless something happens before."""
        due = (
            self._clock.next_s(),
            self.dispatcher.reviews.next_s(),
            self.reconciler.next_s(),
        )
        return min(at_s for at_s in due if at_s is not None)

    def advance(self, now_s: float) -> None:
        """Does what is due: reviews, overdue commands, the policy's look at the whole."""
        for session_id in self.dispatcher.reviews.take_due(now_s):
            session = self.store.get(session_id)
            if session is not None:
                if session.phase is Phase.IO_WAIT:
                    # Others' calls have ended meanwhile.
                    session.forecast = self._predict(session)
                self.dispatcher.decide(session, Cause.REVIEW, now_s)
        overdue = self.reconciler.overdue(now_s)
        for entry in overdue.again:
            self.workers.overdue(entry, now_s)
        for entry in overdue.given_up:
            self.workers.give_up(entry, now_s)
        for _ in self._clock.take_due(now_s):
            self._tick(now_s)
        # Set after the loop: however late a tick comes, it comes once.
        if len(self._clock) == 0:
            self._clock.set(_TICK, now_s + self.config.tick_interval_s)

    def _tick(self, now_s: float) -> None:
        for worker_id in self.dispatcher.whereabouts.wanting.workers():
            self.dispatcher.fill(worker_id, now_s)
        silent_s = now_s - self.config.worker_silence_s
        for worker in list(self.registry):
            if worker.link is not None and worker.heard_s < silent_s:
                _logger.warning("worker %s is silent; taken for lost", worker.hello.worker_id)
                link = worker.link
                self.workers.lost(worker.hello.worker_id, link, now_s)
                link.close(f"nothing was heard for {self.config.worker_silence_s:g} s")
        for expired in self.store.take_expired(now_s):
            _logger.info("session %s has expired", expired.session_id)
            self.close_session(expired.session_id, now_s, expired=True)
        self.registry.forget_lost(now_s - _FORGET_WORKER_S)
        self.store.forget_closed(now_s)

    def _find(self, session_id: str, token: bytes, now_s: float) -> Session:
        session = self.store.get(session_id)
        if session is not None:
            return session
        if self.store.is_closed(session_id):
            raise self.store.closed_error(session_id)
        if not token:
            raise UnknownSessionError.of(session_id)
        told = SessionToken.decode(token)
        if told.session_id != session_id:
            raise InvalidRequestError.of_field(
                "session_token", f"is that of session {told.session_id!r}, not {session_id!r}"
            )
        session = from_token(told, now_s)
        # Its worker, once it connects, will say what it holds; until then it keeps the place.
        session.worker_id = told.worker_id
        home = self.registry.connected(told.worker_id)
        if home is not None:
            self.dispatcher.move(session, home)
        self.store.add(session)
        return session
