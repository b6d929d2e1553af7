"""One agent's conversation out of a run's records."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from loadgen import stories
from loadgen.metrics import WakeSource, wake_latency_ms, wake_source
from loadgen.record import Record, RequestRecord, ToolRecord


def remembered(request: RequestRecord) -> bool:
    """Returns whether a Reflect's answer has what the agent was told before it slept."""
    fact = stories.STORIES[request.agent % len(stories.STORIES)].fact
    return fact.lower() in request.output.lower()


def reflections(records: Sequence[Record]) -> list[RequestRecord]:
    """Returns the Reflect requests of a run with stories that ended well."""
    return [
        record
        for record in records
        if isinstance(record, RequestRecord) and record.step > 0 and record.failure is None
    ]


def choose_agent(records: Sequence[Record]) -> int | None:
    """Returns the agent whose conversation shows most; None if none reflected.

    First one whose KV was moved and who remembered, then one of either, else any.
    """
    found = reflections(records)
    if not found:
        return None
    best = max(
        found,
        key=lambda r: (wake_source(r) is WakeSource.MOVED and remembered(r), remembered(r)),
    )
    return best.agent


def show(records: Sequence[Record], agent: int, console: Console) -> None:
    """Prints what one agent said and was told, and how it slept and woke."""
    requests = sorted(
        (r for r in records if isinstance(r, RequestRecord) and r.agent == agent),
        key=lambda r: r.step,
    )
    tools: dict[int, ToolRecord] = {
        r.step: r for r in records if isinstance(r, ToolRecord) and r.agent == agent
    }
    for request in requests:
        if tool := tools.get(request.step):
            _say(console, "", _sleep(tool, request), "dim")
        for line in request.prompt.split("\n"):
            role, _, content = line.partition(": ")
            _say(console, role, content, "cyan")
        answer = request.output.strip()
        if request.failure is not None:
            answer = f"({request.failure.reason}: {request.failure.message})"
        _say(console, "agent", answer, "bold green")


def _sleep(tool: ToolRecord, request: RequestRecord) -> str:
    text = f"tool {tool.name} runs for {tool.end_s - tool.start_s:.1f} s"
    wake = wake_latency_ms(request)
    if wake is None or request.kv is None:
        return text
    how = {
        WakeSource.MOVED: (
            f"{request.kv.loaded_bytes / 1e6:.1f} MB of KV copied back from the host"
        ),
        WakeSource.RESIDENT: "KV still on the device",
        WakeSource.RECOMPUTED: f"{request.kv.recomputed_tokens} tokens of KV computed again",
        WakeSource.UNKNOWN: "",
    }[wake_source(request)]
    return (
        f"{text}; wakes in {wake:.0f} ms, {how}, "
        f"{request.prefilled_tokens} of {request.prompt_tokens} tokens prefilled"
    )


def _say(console: Console, who: str, text: str, style: str) -> None:
    line = Text.assemble((f"{who:>9}  ", style), text if who else (text, style))
    console.print(line, highlight=False, soft_wrap=True)


def count_remembered(records: Sequence[Record]) -> tuple[int, int]:
    """Returns how many Reflect answers had what they were asked for, and how many there were."""
    answers = [remembered(request) for request in reflections(records)]
    return sum(answers), len(answers)
