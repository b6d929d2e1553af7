import io

from rich.console import Console

from loadgen import conversation, stories
from loadgen.record import Failure, KvFound, Record, RequestRecord, ToolRecord


def request(agent, step, output, **changes) -> RequestRecord:
    fields = {
        "agent": agent,
        "step": step,
        "scheduled_s": 1.0,
        "sent_s": 1.0,
        "end_s": 2.0,
        "first_token_s": 1.04,
        "compute_s": 1.0 if step else None,
        "prompt": "user: What is it?",
        "output": output,
        "prompt_tokens": 70,
        "prefilled_tokens": 27,
        "kv": KvFound(),
    }
    return RequestRecord(**(fields | changes))


def fact(agent) -> str:
    return stories.STORIES[agent].fact


MOVED = KvFound(loaded_blocks=2, loaded_bytes=1_500_000)


def test_whoever_slept_and_remembered_is_shown():
    records: list[Record] = [
        request(0, 1, "no idea"),
        request(1, 1, f"It is {fact(1)}."),
        request(2, 1, f"It is {fact(2).upper()}!", kv=MOVED),
        request(3, 1, "no idea", kv=MOVED),
    ]
    assert conversation.choose_agent(records) == 2
    assert conversation.choose_agent(records[:2]) == 1
    assert conversation.choose_agent(records[:1]) == 0
    assert conversation.choose_agent([request(0, 0, "x")]) is None
    assert conversation.count_remembered(records) == (2, 4)


def test_failed_answers_are_not_counted():
    failed = request(0, 1, fact(0), failure=Failure("X", "y"))
    assert conversation.count_remembered([failed]) == (0, 0)


def test_what_was_said_and_how_it_woke():
    records: list[Record] = [
        request(4, 0, " It is four. ", prompt="system: Be short.\nuser: Hi: you"),
        ToolRecord(4, 1, "search", 2.0, 4.5, 4.5),
        request(4, 1, "Four.", kv=MOVED),
        request(5, 0, "somebody else"),
    ]
    out = io.StringIO()
    conversation.show(records, 4, Console(file=out, width=200))
    lines = [" ".join(line.split()) for line in out.getvalue().splitlines()]
    woke = (
        "tool search runs for 2.5 s; wakes in 40 ms, 1.5 MB of KV copied back from the host, "
        "27 of 70 tokens prefilled"
    )
    assert lines == [
        "system Be short.",
        "user Hi: you",
        "agent It is four.",
        woke,
        "user What is it?",
        "agent Four.",
    ]


def test_a_failure_is_shown_as_one():
    out = io.StringIO()
    failed = request(0, 0, "half an ans", failure=Failure("ENGINE_LOST", "gone"))
    conversation.show([failed], 0, Console(file=out, width=100))
    assert "(ENGINE_LOST: gone)" in out.getvalue()
