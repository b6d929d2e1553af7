"""One agent's life: Reason, then Act and Reflect as often as its plan says."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from enum import StrEnum

from loadgen.pacer import RunClock
from loadgen.record import (
    AgentRecord,
    Failure,
    Record,
    RequestRecord,
    SignalRecord,
    ToolRecord,
)
from loadgen.shapes import ToolCall
from loadgen.targets.base import AgentSession, Delta, Outcome, Target, TargetError
from loadgen.workload import AgentPlan, ChatPrompt, Step, TokenPrompt

CLOSE_TIMEOUT_S = 10.0
SIGNAL_GRACE_S = 1.0


class State(StrEnum):
    """What an agent does now, for the progress display."""

    REASON = "reason"
    ACT = "act"
    REFLECT = "reflect"
    WAIT = "wait"
    DONE = "done"
    FAILED = "failed"


class AgentRun:
    """Runs one agent.

    Args:
        plan: What it does.
        target: What it is run against.
        clock: The run's clock.
        emit: Takes each record as soon as it is complete.
        states: Counts agents by state; kept up to date.
        timeout_s: Most seconds for one request.
        oracle: Tell the target how long each tool call takes.
        on_work_done: Called once its last request has ended, well or not.
        release: Where given, the session stays open until it is set.
        record_tokens: Write the ids of generated tokens down.
    """

    def __init__(
        self,
        plan: AgentPlan,
        target: Target,
        clock: RunClock,
        emit: Callable[[Record], None],
        states: Counter[State],
        *,
        timeout_s: float,
        oracle: bool = False,
        on_work_done: Callable[[], None] | None = None,
        release: asyncio.Event | None = None,
        record_tokens: bool = False,
    ) -> None:
        self._plan = plan
        self._target = target
        self._clock = clock
        self._emit = emit
        self._states = states
        self._state: State | None = None
        self._timeout_s = timeout_s
        self._oracle = oracle
        self._on_work_done = on_work_done
        self._release = release
        self._record_tokens = record_tokens
        self._refusals = 0
        self._signals: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Runs the agent to its end and emits its records; its failure is a record, not raised."""
        plan, clock = self._plan, self._clock
        failure: Failure | None = None
        opened_s: float | None = None
        closed_s: float | None = None
        session: AgentSession | None = None
        self._enter(State.REASON)
        sent_s = clock.now()
        done_s = sent_s
        try:
            session = self._target.session(plan.name, plan.tenant, _known_length(plan.steps[0]))
            await self._open(session)
            opened_s = clock.now()
            await self._steps(session)
            done_s = self._work_done()
            if self._release is not None:
                self._enter(State.WAIT)
                await self._release.wait()
        except TargetError as error:
            failure = Failure(error.reason, error.message)
            done_s = self._work_done()
        except asyncio.CancelledError:
            failure = Failure("INTERRUPTED", "the run was stopped")
            done_s = clock.now()
            raise
        finally:
            self._enter(State.DONE if failure is None else State.FAILED)
            if session is not None:
                closed_s = await self._end(session)
            self._emit(
                AgentRecord(
                    agent=plan.index,
                    name=plan.name,
                    scheduled_s=plan.arrival_s,
                    session_id=session.session_id if session is not None else "",
                    open_sent_s=sent_s,
                    opened_s=opened_s,
                    done_s=done_s,
                    closed_s=closed_s,
                    refusals=self._refusals,
                    failure=failure,
                )
            )

    async def _open(self, session: AgentSession) -> None:
        """Opens the session, as often as the server says to come again later."""
        give_up_s = self._clock.now() + self._timeout_s
        while True:
            try:
                return await session.open()
            except TargetError as error:
                now_s = self._clock.now()
                if error.retry_after_s is None or now_s + error.retry_after_s > give_up_s:
                    raise
                self._refusals += 1
                await self._clock.sleep_until(now_s + error.retry_after_s)

    def _work_done(self) -> float:
        if self._on_work_done is not None:
            self._on_work_done()
        return self._clock.now()

    def _enter(self, state: State) -> None:
        if self._state is not None:
            self._states[self._state] -= 1
        self._states[state] += 1
        self._state = state

    async def _end(self, session: AgentSession) -> float | None:
        """Closes the session; returns when it was, or None if it could not be.

        An agent that abandons its session leaves it open: it is the server's to reap.
        """
        signals = set(self._signals)
        if signals:
            # Their answers are part of the record, if they come soon.
            await asyncio.wait(signals, timeout=SIGNAL_GRACE_S)
        for task in signals:
            task.cancel()
        await asyncio.gather(*signals, return_exceptions=True)
        if self._plan.abandons:
            return None
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await session.close()
        except (TargetError, TimeoutError):
            # The agent has done its work: a session left open is the server's to reap.
            return None
        return self._clock.now()

    async def _steps(self, session: AgentSession) -> None:
        for number, step in enumerate(self._plan.steps):
            scheduled_s = self._plan.arrival_s
            compute_s: float | None = None
            if step.tool is not None:
                self._enter(State.ACT)
                scheduled_s = await self._act(session, number, step.tool)
                self._enter(State.REFLECT)
                compute_s = self._clock.now()
                session.tool_ended()
                self._emit(SignalRecord(self._plan.index, number, "COMPUTE", compute_s))
            await self._request(session, number, step, scheduled_s, compute_s)
        if self._plan.abandons:
            self._signal_wait(session, len(self._plan.steps), self._last_tool(), None)

    def _last_tool(self) -> str:
        call = self._plan.steps[-1].tool
        return call.name if call is not None else "tool"

    async def _act(self, session: AgentSession, number: int, tool: ToolCall) -> float:
        """Runs a tool; returns when it was due to return."""
        start_s = self._clock.now()
        due_s = tool.due_s(start_s)
        self._signal_wait(session, number, tool.name, due_s - start_s if self._oracle else None)
        await self._clock.sleep_until(due_s)
        self._emit(
            ToolRecord(self._plan.index, number, tool.name, start_s, due_s, self._clock.now())
        )
        return due_s

    def _signal_wait(
        self, session: AgentSession, number: int, tool: str, expected_s: float | None
    ) -> None:
        """Says that a tool has started; the tool does not wait for the scheduler's answer."""
        sent_s = self._clock.now()
        answer = session.tool_started(tool, expected_s)
        signal = asyncio.create_task(self._answered(answer, number, sent_s))
        self._signals.add(signal)
        signal.add_done_callback(self._signals.discard)

    async def _answered(self, answer: Awaitable[None], number: int, sent_s: float) -> None:
        failure: Failure | None = None
        answered_s: float | None = None
        try:
            await answer
            answered_s = self._clock.now()
        except TargetError as error:
            # Signals help the server place KV; an agent lives on without them.
            failure = Failure(error.reason, error.message)
        self._emit(SignalRecord(self._plan.index, number, "IO_WAIT", sent_s, answered_s, failure))

    async def _request(
        self,
        session: AgentSession,
        number: int,
        step: Step,
        scheduled_s: float,
        compute_s: float | None,
    ) -> None:
        clock = self._clock
        deltas: list[tuple[float, int]] = []
        text: list[str] = []
        token_ids: list[int] = []
        outcome = Outcome(finish_reason="")
        failure: Failure | None = None
        sent_s = clock.now()
        try:
            async with asyncio.timeout(self._timeout_s):
                generation = session.generate(step.prompt, step.new_tokens, self._timeout_s)
                async for delta in generation:
                    _take(delta, clock, deltas, text)
                    token_ids.extend(delta.token_ids)
                outcome = await generation.outcome()
            if not deltas:
                raise TargetError("NO_TOKENS", "the generation ended without a token")
        except TimeoutError:
            error = TargetError("TIMEOUT", f"a request took longer than {self._timeout_s:g} s")
            failure = Failure(error.reason, error.message)
            raise error from None
        except TargetError as error:
            failure = Failure(error.reason, error.message)
            raise
        except asyncio.CancelledError:
            failure = Failure("INTERRUPTED", "the run was stopped")
            raise
        finally:
            self._emit(
                RequestRecord(
                    agent=self._plan.index,
                    step=number,
                    scheduled_s=scheduled_s,
                    compute_s=compute_s,
                    sent_s=sent_s,
                    first_token_s=deltas[0][0] if deltas else None,
                    end_s=clock.now(),
                    appended_tokens=_known_length(step),
                    output_tokens=sum(count for _, count in deltas),
                    prompt_tokens=outcome.prompt_tokens,
                    cached_tokens=outcome.cached_tokens,
                    prefilled_tokens=outcome.prefilled_tokens,
                    deltas=deltas,
                    token_ids=token_ids if self._record_tokens else [],
                    queue_s=outcome.queue_s,
                    finish_reason=outcome.finish_reason,
                    kv=outcome.kv,
                    resends=outcome.resends,
                    prompt=_text_of(step),
                    output="".join(text) if isinstance(step.prompt, ChatPrompt) else "",
                    failure=failure,
                )
            )


def _take(delta: Delta, clock: RunClock, deltas: list[tuple[float, int]], text: list[str]) -> None:
    # Text alone is no token: it may have been held back from earlier ones.
    if delta.token_count:
        deltas.append((clock.now(), delta.token_count))
    text.append(delta.text)


def _known_length(step: Step) -> int:
    return len(step.prompt.ids) if isinstance(step.prompt, TokenPrompt) else 0


def _text_of(step: Step) -> str:
    if isinstance(step.prompt, TokenPrompt):
        return ""
    return "\n".join(f"{turn.role}: {turn.content}" for turn in step.prompt.turns)
