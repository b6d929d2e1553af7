"""What a person sees while a run goes on: a live display on a terminal, plain lines otherwise."""

from __future__ import annotations

import os
from collections import Counter, deque
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from loadgen.metrics import quantile, wake_latency_ms, wake_source
from loadgen.record import Record, RequestRecord

PLAIN_INTERVAL_S = 5.0
_RECENT_WAKES = 200


PLAIN_WIDTH = 110


def console(*, stderr: bool = False) -> Console:
    """Returns a console that is wide enough for our tables where nobody has set a width."""
    found = Console(stderr=stderr)
    if not found.is_terminal and "COLUMNS" not in os.environ:
        return Console(stderr=stderr, width=PLAIN_WIDTH)
    return found


class Tally:
    """What has happened until now.

    Args:
        total_agents: Agents of the run.
    """

    def __init__(self, total_agents: int) -> None:
        self.total_agents = total_agents
        self.now_s = 0.0
        self.states: Counter[str] = Counter()
        self.requests = 0
        self.failed_requests = 0
        self.output_tokens = 0
        self.sources: Counter[str] = Counter()
        self.last_error = ""
        self.device_share: float | None = None
        self._states_of: dict[int, dict[str, int]] = {}
        self._wakes: deque[float] = deque(maxlen=_RECENT_WAKES)

    def set_states(self, process: int, states: dict[str, int]) -> None:
        """Takes one client process's count of agents by state."""
        self._states_of[process] = states
        self.states = Counter()
        for part in self._states_of.values():
            self.states.update(part)

    def add(self, record: Record) -> None:
        """Counts one record."""
        if not isinstance(record, RequestRecord):
            return
        self.output_tokens += record.output_tokens
        if record.failure is not None:
            self.failed_requests += 1
            self.last_error = f"{record.failure.reason}: {record.failure.message}"
            return
        self.requests += 1
        wake = wake_latency_ms(record)
        if wake is not None:
            self._wakes.append(wake)
            self.sources[wake_source(record).value] += 1

    def set_stats(self, stats: dict[str, float]) -> None:
        """Takes the server's counters."""
        total = stats.get("device_total_blocks", 0.0)
        self.device_share = stats.get("device_used_blocks", 0.0) / total if total else None

    def wakes(self) -> str:
        """Returns the last wakes in a few words; empty if there was none."""
        if not self._wakes:
            return ""
        ordered = sorted(self._wakes)
        found = ", ".join(f"{count} {source}" for source, count in sorted(self.sources.items()))
        return (
            f"wake p50 {quantile(ordered, 0.5):.1f} ms, p99 {quantile(ordered, 0.99):.1f} ms "
            f"({found})"
        )

    def line(self) -> str:
        """Returns everything in one line."""
        parts = [f"{self.now_s:6.1f} s", f"{self._done()}/{self.total_agents} agents done"]
        busy = [f"{n} {name}" for name, n in sorted(self.states.items()) if name != "done" and n]
        parts += busy
        parts.append(f"{self.requests} requests")
        if wakes := self.wakes():
            parts.append(wakes)
        if self.device_share is not None:
            parts.append(f"device pool {self.device_share:.0%} used")
        if self.last_error:
            parts.append(f"last error {self.last_error}")
        return "  ".join(parts)

    def _done(self) -> int:
        return self.states["done"] + self.states["wait"]

    def finished(self) -> int:
        """Returns how many agents have done their work or failed."""
        return self._done() + self.states["failed"]


class Progress(Protocol):
    """A display of a run's progress."""

    def say(self, text: str) -> None: ...

    def update(self, tally: Tally) -> None: ...

    def close(self) -> None: ...


class NoProgress:
    """Shows nothing."""

    def say(self, text: str) -> None:
        pass

    def update(self, tally: Tally) -> None:
        pass

    def close(self) -> None:
        pass


class PlainProgress:
    """One line every few seconds.

    Args:
        console: Where to write.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._next_s = PLAIN_INTERVAL_S
        self._tally: Tally | None = None

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def update(self, tally: Tally) -> None:
        if tally is not self._tally:
            # Another run, whose time begins anew.
            self._tally, self._next_s = tally, PLAIN_INTERVAL_S
        if tally.now_s >= self._next_s:
            self._next_s = tally.now_s + PLAIN_INTERVAL_S
            self.say(tally.line())

    def close(self) -> None:
        pass


class LiveProgress:
    """A few lines that are drawn again in place.

    Args:
        console: A terminal.
    """

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, refresh_per_second=4, transient=True)
        self._console = console
        self._live.start()

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def update(self, tally: Tally) -> None:
        self._live.update(_panel(tally))

    def close(self) -> None:
        self._live.stop()


_STATE_STYLES = {
    "reason": "cyan",
    "act": "yellow",
    "reflect": "green",
    "wait": "dim",
    "done": "dim",
    "failed": "red",
}


def _panel(tally: Tally) -> Group:
    table = Table.grid(padding=(0, 2))
    bar = ProgressBar(total=tally.total_agents, completed=tally.finished(), width=40)
    table.add_row(
        f"{tally.now_s:7.1f} s", bar, f"{tally.finished()} of {tally.total_agents} agents done"
    )
    states = Text("  ").join(
        Text(f"{tally.states[name]} {name}", style=style) for name, style in _STATE_STYLES.items()
    )
    lines: list[Table | Text] = [table, states]
    summary = f"{tally.requests} requests, {tally.output_tokens} tokens"
    if wakes := tally.wakes():
        summary += f", {wakes}"
    if tally.device_share is not None:
        summary += f", device pool {tally.device_share:.0%} used"
    lines.append(Text(summary))
    if tally.last_error:
        lines.append(Text(tally.last_error, style="red"))
    return Group(*lines)


def make(console: Console, *, quiet: bool = False) -> Progress:
    """Returns the display that fits: none, live, or plain lines."""
    if quiet:
        return NoProgress()
    return LiveProgress(console) if console.is_terminal else PlainProgress(console)
