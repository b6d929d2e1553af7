import asyncio
from collections import Counter
from typing import Any

import msgspec
import pytest

from loadgen.agent import AgentRun, State
from loadgen.pacer import RunClock
from loadgen.record import AgentRecord, KvFound, RequestRecord, SignalRecord, ToolRecord
from loadgen.shapes import ToolCall
from loadgen.stories import Turn
from loadgen.targets.base import Delta, Outcome, TargetError
from loadgen.workload import AgentPlan, ChatPrompt, Step, TokenPrompt


class HandClock(RunClock):
    """Time that passes when somebody sleeps, and a little with each look."""

    def __init__(self):
        super().__init__(0)
        self.time_s = 10.0

    def now(self):
        self.time_s += 0.001
        return self.time_s

    async def sleep_until(self, due_s):
        self.time_s = max(self.time_s, due_s)


class FakeTarget:
    """A target that writes down what it is asked and fails where told to."""

    name = "fake"

    def __init__(self, clock, deltas=((1, "a"), (0, "b"), (2, "c")), fail=(), hang=""):
        self.clock = clock
        self.deltas = deltas
        self.fail = set(fail)
        self.hang = hang
        self.calls = []
        self.session_id = "s-1"
        self.refusals: list[float] = []
        self.hanging = asyncio.Event()

    def session(self, name, tenant, first_prompt_tokens):
        self.calls.append(("session", name, first_prompt_tokens))
        return self

    def check(self, *call):
        self.calls.append(call)
        if call[0] in self.fail:
            raise TargetError("BROKEN", f"{call[0]} failed")

    async def open(self):
        self.check("open")
        if self.refusals:
            raise TargetError("EXHAUSTED", "full", self.refusals.pop(0))

    def generate(self, prompt, max_tokens, timeout_s):
        self.check("generate", prompt, max_tokens)
        return FakeGeneration(self)

    def tool_started(self, name, expected_s):
        self.calls.append(("tool_started", name, expected_s))

        async def answer():
            await asyncio.sleep(0)
            if "tool_started" in self.fail:
                raise TargetError("BROKEN", "tool_started failed")

        return answer()

    def tool_ended(self):
        self.check("tool_ended")

    async def close(self):
        self.check("close")


class FakeGeneration:
    def __init__(self, target):
        self.target = target

    async def __aiter__(self):
        for count, text in self.target.deltas:
            yield Delta(count, text)
        if self.target.hang == "stream":
            self.target.hanging.set()
            await asyncio.Event().wait()
        if "stream" in self.target.fail:
            raise TargetError("ENGINE_LOST", "in the middle")

    async def outcome(self):
        return Outcome(finish_reason="length", kv=KvFound(loaded_blocks=2), prefilled_tokens=5)


def plan(think_s=3.0, prompt=None, iterations=1):
    first = Step(prompt or TokenPrompt([1, 2, 3]), 7)
    second = Step(TokenPrompt([4]), 7, ToolCall("search", think_s))
    return AgentPlan(5, "agent-5", 9.5, (first,) + (second,) * iterations)


async def run(target, agent_plan=None, **changes):
    records: list[Any] = []
    states: Counter[State] = Counter()
    options: dict[str, Any] = {"timeout_s": 5.0} | changes
    agent = AgentRun(agent_plan or plan(), target, target.clock, records.append, states, **options)
    await agent.run()
    return records, states


def of_kind(records, kind):
    return [record for record in records if isinstance(record, kind)]


async def test_a_whole_life():
    target = FakeTarget(HandClock())
    records, states = await run(target)
    assert [call[0] for call in target.calls] == [
        "session",
        "open",
        "generate",
        "tool_started",
        "tool_ended",
        "generate",
        "close",
    ]
    reason, reflect = of_kind(records, RequestRecord)
    (agent,) = of_kind(records, AgentRecord)
    (tool,) = of_kind(records, ToolRecord)
    assert reason.scheduled_s == 9.5
    assert reason.compute_s is None
    assert reason.output_tokens == 3
    assert [count for _, count in reason.deltas] == [1, 2]
    assert reason.first_token_s == reason.deltas[0][0] > reason.sent_s
    assert reflect.scheduled_s == tool.due_s == pytest.approx(tool.start_s + 3.0)
    assert tool.end_s <= reflect.compute_s <= reflect.sent_s
    assert reflect.kv == KvFound(loaded_blocks=2)
    assert (agent.session_id, agent.failure) == ("s-1", None)
    assert agent.opened_s < reason.sent_s
    assert agent.done_s <= agent.closed_s
    assert +states == Counter({State.DONE: 1})


async def test_both_signals_are_recorded_with_the_answer_to_the_first():
    records, _ = await run(FakeTarget(HandClock()))
    signals = {s.phase: s for s in of_kind(records, SignalRecord)}
    assert signals["IO_WAIT"].answered_s > signals["IO_WAIT"].sent_s
    assert signals["COMPUTE"].sent_s > signals["IO_WAIT"].sent_s


async def test_a_tool_that_takes_no_time_still_signals_in_order():
    target = FakeTarget(HandClock())
    await run(target, plan(think_s=0.0, iterations=3))
    calls = [call[0] for call in target.calls if call[0].startswith("tool")]
    assert calls == ["tool_started", "tool_ended"] * 3


async def test_the_think_time_is_told_to_nobody():
    target = FakeTarget(HandClock())
    await run(target)
    assert ("tool_started", "search", None) in target.calls


async def test_an_oracle_tells_it():
    target = FakeTarget(HandClock())
    await run(target, oracle=True)
    assert ("tool_started", "search", 3.0) in target.calls


async def test_tools_that_return_together_wait_for_their_time():
    target = FakeTarget(HandClock())
    first = Step(TokenPrompt([1]), 7)
    second = Step(TokenPrompt([4]), 7, ToolCall("batch", 3.0, period_s=30.0))
    records, _ = await run(target, AgentPlan(0, "a", 9.5, (first, second)))
    (tool,) = of_kind(records, ToolRecord)
    assert tool.due_s == 30.0
    assert tool.end_s >= 30.0


async def test_an_agent_that_abandons_its_session_begins_a_tool_call_and_never_closes_it():
    target = FakeTarget(HandClock())
    records, states = await run(target, msgspec.structs.replace(plan(), abandons=True))
    assert [call[0] for call in target.calls][-2:] == ["generate", "tool_started"]
    (agent,) = of_kind(records, AgentRecord)
    assert (agent.failure, agent.closed_s) == (None, None)
    assert [s.step for s in of_kind(records, SignalRecord) if s.phase == "IO_WAIT"] == [1, 2]
    assert +states == Counter({State.DONE: 1})


async def test_an_agent_that_is_told_to_come_again_later_does():
    target = FakeTarget(HandClock())
    target.refusals = [1.0, 2.0]
    records, _ = await run(target)
    (agent,) = of_kind(records, AgentRecord)
    assert (agent.failure, agent.refusals) == (None, 2)
    assert agent.opened_s - agent.open_sent_s >= 3.0
    assert of_kind(records, RequestRecord)[0].scheduled_s == 9.5


async def test_an_agent_that_is_told_to_wait_for_too_long_gives_up():
    target = FakeTarget(HandClock())
    target.refusals = [4.0, 4.0]
    records, _ = await run(target)
    (agent,) = of_kind(records, AgentRecord)
    assert (agent.failure.reason, agent.refusals) == ("EXHAUSTED", 1)


async def test_text_is_kept_and_random_tokens_are_not():
    chat = ChatPrompt((Turn("system", "Be short."), Turn("user", "Hi")))
    records, _ = await run(FakeTarget(HandClock()), plan(prompt=chat))
    reason, reflect = of_kind(records, RequestRecord)
    assert (reason.prompt, reason.output) == ("system: Be short.\nuser: Hi", "abc")
    assert (reflect.prompt, reflect.output) == ("", "")


@pytest.mark.parametrize("call", ["open", "generate", "stream", "tool_ended"])
async def test_a_failure_ends_the_agent_and_closes_its_session(call):
    target = FakeTarget(HandClock(), fail=[call])
    records, states = await run(target)
    (agent,) = of_kind(records, AgentRecord)
    assert agent.failure.reason in {"BROKEN", "ENGINE_LOST"}
    assert target.calls[-1][0] == "close"
    assert +states == Counter({State.FAILED: 1})


async def test_a_request_that_fails_in_the_middle_keeps_what_it_got():
    records, _ = await run(FakeTarget(HandClock(), fail=["stream"]))
    (request,) = of_kind(records, RequestRecord)
    assert request.failure.reason == "ENGINE_LOST"
    assert request.output_tokens == 3


async def test_a_generation_without_tokens_has_failed():
    records, _ = await run(FakeTarget(HandClock(), deltas=[(0, "text alone")]))
    (request,) = of_kind(records, RequestRecord)
    assert (request.failure.reason, request.first_token_s) == ("NO_TOKENS", None)


async def test_a_request_that_takes_too_long_has_failed():
    records, _ = await run(FakeTarget(HandClock(), hang="stream"), timeout_s=0.01)
    (request,) = of_kind(records, RequestRecord)
    assert request.failure.reason == "TIMEOUT"
    assert "0.01 s" in request.failure.message


async def test_an_agent_lives_on_without_signals():
    records, _ = await run(FakeTarget(HandClock(), fail=["tool_started"]))
    (agent,) = of_kind(records, AgentRecord)
    assert agent.failure is None
    failed = [s for s in of_kind(records, SignalRecord) if s.failure]
    assert [s.phase for s in failed] == ["IO_WAIT"]


async def test_a_session_that_cannot_be_closed_does_not_fail_its_agent():
    records, _ = await run(FakeTarget(HandClock(), fail=["close"]))
    (agent,) = of_kind(records, AgentRecord)
    assert (agent.failure, agent.closed_s) == (None, None)


async def test_in_live_mode_the_session_stays_open_until_all_are_done():
    target = FakeTarget(HandClock())
    release, done = asyncio.Event(), asyncio.Event()
    running = asyncio.create_task(run(target, release=release, on_work_done=done.set))
    await done.wait()
    assert target.calls[-1][0] == "generate"
    release.set()
    records, _ = await running
    assert target.calls[-1][0] == "close"
    assert of_kind(records, AgentRecord)[0].failure is None


async def test_a_stopped_agent_closes_its_session_and_says_so():
    clock = HandClock()
    target: Any = FakeTarget(clock, hang="stream")
    records: list[Any] = []
    agent = AgentRun(plan(), target, clock, records.append, Counter(), timeout_s=60.0)
    running = asyncio.create_task(agent.run())
    await target.hanging.wait()
    running.cancel()
    await asyncio.wait([running])
    assert running.cancelled()
    assert target.calls[-1][0] == "close"
    assert of_kind(records, AgentRecord)[0].failure.reason == "INTERRUPTED"
    assert of_kind(records, RequestRecord)[0].failure.reason == "INTERRUPTED"
