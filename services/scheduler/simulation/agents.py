"""Agents in virtual time: each goes through its trace, and its next step waits for the last."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from services.common.errors import DjinnError
from services.scheduler.coordinator import Coordinator, OpenRequest
from services.scheduler.domain import Phase
from services.scheduler.session import Session, Signal
from services.scheduler.simulation.batch_model import ModelRequest
from services.scheduler.simulation.clock import Events
from services.scheduler.simulation.parameters import Latencies
from services.scheduler.simulation.result import (
    AgentRecord,
    Failure,
    KvFound,
    Record,
    RequestRecord,
    SignalRecord,
    ToolRecord,
)
from services.scheduler.simulation.trace import TracedAgent
from services.scheduler.simulation.worker_model import WorkerModel

GIVE_UP_S = 600.0
"""An agent that is not admitted for so long has failed."""


@dataclass(slots=True)
class Population:
    """What all agents have in common.

    Attributes:
        events: The time.
        coordinator: The scheduler.
        on_told: Called after the scheduler was told something.
        workers: By endpoint.
        latencies: Of messages.
        emit: Takes each record.
        block_bytes: Of every worker.
        tenant: Whose the agents are that have none of their own.
        live: Agents keep their sessions until the last one has done its work.
        oracle: The scheduler is told how long each tool call will take.
        at_work: Agents that have not done their work.
        waiting: Agents that have, and wait for the others before they leave.
    """

    events: Events
    coordinator: Coordinator
    on_told: Callable[[], None]
    workers: Mapping[str, WorkerModel]
    latencies: Latencies
    emit: Callable[[Record], None]
    block_bytes: int
    tenant: str
    live: bool
    oracle: bool
    at_work: int = 0
    waiting: list[Agent] = field(default_factory=list)

    def work_done(self, agent: Agent) -> None:
        """Takes in that an agent has done its work."""
        self.at_work -= 1
        if self.live:
            self.waiting.append(agent)
        else:
            agent.leave()
        if not self.at_work:
            for other in self.waiting:
                other.leave()
            self.waiting.clear()
            self.events.stop()


class Agent:
    """One agent.

    Args:
        population: What it shares with the others.
        index: Its number in order of arrival.
        traced: What it does.
    """

    __slots__ = (
        "_compute_s",
        "_done_s",
        "_endpoint",
        "_failure",
        "_index",
        "_open_sent_s",
        "_opened_s",
        "_population",
        "_refusals",
        "_scheduled_s",
        "_sent_s",
        "_sequence",
        "_session",
        "_step",
        "_traced",
    )

    def __init__(self, population: Population, index: int, traced: TracedAgent) -> None:
        self._population = population
        self._index = index
        self._traced = traced
        self._step = 0
        self._sequence = 0
        self._refusals = 0
        self._endpoint = ""
        self._session: Session | None = None
        self._open_sent_s = 0.0
        self._opened_s: float | None = None
        self._scheduled_s = traced.arrival_s
        self._compute_s: float | None = None
        self._sent_s = 0.0
        self._done_s = 0.0
        self._failure: Failure | None = None
        population.at_work += 1
        population.events.at(traced.arrival_s, self._arrive)

    # --- opening ---------------------------------------------------------------------------------

    def _arrive(self) -> None:
        self._open_sent_s = self._population.events.now_s
        self._population.events.after(self._population.latencies.signal_s, self._open)

    def _open(self) -> None:
        """What the scheduler does when OpenSession has arrived."""
        population, traced = self._population, self._traced
        events = population.events
        request = OpenRequest(
            session_id=traced.name,
            name=traced.name,
            tenant_id=traced.tenant or population.tenant,
            priority=traced.priority,
            expected_tokens=traced.steps[0].input_tokens,
        )
        try:
            self._session = population.coordinator.open_session(request, events.now_s)
        except DjinnError as error:
            again_s = error.retry_after_s
            waited_s = events.now_s - self._open_sent_s
            if again_s is None or waited_s + again_s > GIVE_UP_S:
                self._fail(error.reason, error.message)
                return
            self._refusals += 1
            events.after(again_s + 2 * population.latencies.signal_s, self._open)
            return
        self._endpoint = population.coordinator.dispatcher.endpoint(self._session)
        population.on_told()
        events.after(population.latencies.signal_s, self._opened)

    def _opened(self) -> None:
        self._opened_s = self._population.events.now_s
        self._generate()

    # --- a request -------------------------------------------------------------------------------

    def _generate(self) -> None:
        self._sent_s = self._population.events.now_s
        self._population.events.after(self._population.latencies.submit_s, self._submit)

    def _submit(self) -> None:
        """What the worker does when Generate has arrived."""
        worker = self._population.workers[self._endpoint]
        step = self._traced.steps[self._step]
        known = worker.sessions.get(self._traced.name)
        context = (known.log_tokens if known is not None else 0) + step.input_tokens
        if not worker.fits(context + step.output_tokens):
            self._fail("CONTEXT_TOO_LONG", f"{context} tokens and {step.output_tokens} new ones")
            return
        worker.submit(self._traced.name, step.input_tokens, step.output_tokens, self._finished)

    def _finished(self, request: ModelRequest) -> None:
        self._population.events.after(
            self._population.latencies.return_s, self._answered, self._record(request)
        )

    def _record(self, request: ModelRequest) -> RequestRecord:
        back_s = self._population.latencies.return_s
        session = request.session
        assert request.first_token_s is not None
        assert request.started_s is not None
        return RequestRecord(
            agent=self._index,
            step=self._step,
            scheduled_s=_rounded(self._scheduled_s),
            compute_s=None if self._compute_s is None else _rounded(self._compute_s),
            sent_s=_rounded(self._sent_s),
            first_token_s=_rounded(request.first_token_s + back_s),
            end_s=_rounded(request.end_s + back_s),
            appended_tokens=request.append_tokens,
            output_tokens=request.new_tokens,
            prompt_tokens=request.prompt_tokens,
            cached_tokens=request.cached_tokens,
            prefilled_tokens=request.prompt_tokens - request.cached_tokens,
            deltas=[(_rounded(time_s + back_s), count) for time_s, count in request.deltas],
            queue_s=_rounded(request.started_s - request.submitted_s),
            finish_reason="length",
            kv=KvFound(
                held_blocks=request.held_blocks,
                resident_blocks=session.resident_blocks,
                loaded_blocks=session.loaded_blocks,
                loaded_bytes=session.loaded_blocks * self._population.block_bytes,
                recomputed_tokens=request.recomputed_tokens,
                load_s=_rounded(session.load_s),
            ),
        )

    def _answered(self, record: RequestRecord) -> None:
        self._population.emit(record)
        self._step += 1
        if self._step < len(self._traced.steps):
            self._act()
            return
        if self._traced.abandons:
            self._signal(Phase.IO_WAIT, "", None)
        self._done()

    # --- a tool call -----------------------------------------------------------------------------

    def _act(self) -> None:
        population = self._population
        step = self._traced.steps[self._step]
        now_s = population.events.now_s
        due_s = now_s + step.tool_s
        if step.tool_period_s:
            due_s = math.ceil(due_s / step.tool_period_s) * step.tool_period_s
        self._signal(Phase.IO_WAIT, step.tool, due_s - now_s if population.oracle else None)
        end_s = _rounded(due_s)
        population.emit(
            ToolRecord(self._index, self._step, step.tool, _rounded(now_s), end_s, end_s)
        )
        population.events.at(due_s, self._wake)

    def _wake(self) -> None:
        now_s = self._population.events.now_s
        self._scheduled_s = self._compute_s = now_s
        self._signal(Phase.COMPUTE, "", None)
        self._generate()

    def _signal(self, phase: Phase, tool: str, expected_s: float | None) -> None:
        population = self._population
        now_s = population.events.now_s
        self._sequence += 1
        signal = Signal(phase, self._sequence, tool, expected_s)
        population.events.after(population.latencies.signal_s, self._signalled, signal)
        answered_s = None
        if phase is Phase.IO_WAIT:
            answered_s = _rounded(now_s + 2 * population.latencies.signal_s)
        population.emit(
            SignalRecord(self._index, self._step, phase.name, _rounded(now_s), answered_s)
        )

    def _signalled(self, signal: Signal) -> None:
        """What the scheduler does when a signal has arrived."""
        outcome = self._population.coordinator.signal(
            self._traced.name, signal, self._population.events.now_s
        )
        self._endpoint = outcome.endpoint or self._endpoint
        self._population.on_told()

    # --- the end ---------------------------------------------------------------------------------

    def _fail(self, reason: str, message: str) -> None:
        self._failure = Failure(reason, message)
        self._done()

    def _done(self) -> None:
        self._done_s = self._population.events.now_s
        self._population.work_done(self)

    def leave(self) -> None:
        """Closes the session, unless the agent is one that never does, and ends the agent."""
        population = self._population
        closed_s: float | None = None
        if self._session is not None and not self._traced.abandons:
            now_s = population.events.now_s
            population.events.after(population.latencies.signal_s, self._close)
            closed_s = _rounded(now_s + 2 * population.latencies.signal_s)
        population.emit(
            AgentRecord(
                agent=self._index,
                name=self._traced.name,
                scheduled_s=_rounded(self._traced.arrival_s),
                open_sent_s=_rounded(self._open_sent_s),
                done_s=_rounded(self._done_s),
                session_id=self._traced.name if self._session is not None else "",
                opened_s=None if self._opened_s is None else _rounded(self._opened_s),
                closed_s=closed_s,
                refusals=self._refusals,
                failure=self._failure,
            )
        )

    def _close(self) -> None:
        population = self._population
        population.coordinator.close_session(self._traced.name, population.events.now_s)
        population.on_told()


def _rounded(time_s: float) -> float:
    """Returns a time to the microsecond, as real runs record it."""
    return round(time_s, 6)
