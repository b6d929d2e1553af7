import io

from rich.console import Console

from loadgen import progress
from loadgen.progress import PlainProgress, Tally
from loadgen.record import Failure, KvFound, RequestRecord


def wake(latency_s=0.05, **changes) -> RequestRecord:
    fields = {
        "agent": 0,
        "step": 1,
        "scheduled_s": 1.0,
        "compute_s": 1.0,
        "sent_s": 1.0,
        "first_token_s": 1.0 + latency_s,
        "end_s": 2.0,
        "output_tokens": 7,
        "kv": KvFound(loaded_blocks=1),
    }
    return RequestRecord(**(fields | changes))


def test_a_line_says_how_the_run_goes():
    tally = Tally(10)
    tally.now_s = 12.0
    tally.set_states(0, {"reason": 2, "done": 1})
    tally.set_states(1, {"act": 3, "wait": 1})
    tally.set_states(0, {"reason": 1, "done": 2})
    tally.add(wake())
    tally.add(wake(failure=Failure("ENGINE_LOST", "gone")))
    tally.set_stats({"device_total_blocks": 10.0, "device_used_blocks": 4.0})
    line = tally.line()
    for part in (
        "12.0 s",
        "3/10 agents done",
        "1 reason",
        "3 act",
        "1 requests",
        "wake p50 50.0 ms, p99 50.0 ms (1 moved)",
        "device pool 40% used",
        "last error ENGINE_LOST: gone",
    ):
        assert part in line
    assert "\n" not in line


def test_plain_lines_come_every_few_seconds():
    out = io.StringIO()
    display = PlainProgress(Console(file=out, width=80))
    tally = Tally(10)
    for tally.now_s in (1.0, 5.0, 6.0, 9.9, 10.0):
        display.update(tally)
    again = Tally(10)
    for again.now_s in (1.0, 6.0):
        display.update(again)
    display.close()
    assert [line.split()[0] for line in out.getvalue().splitlines()] == ["5.0", "10.0", "6.0"]


def test_a_terminal_gets_a_live_display():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100)
    display = progress.make(console)
    tally = Tally(10)
    tally.set_states(0, {"act": 3})
    tally.add(wake())
    display.say("hello [1]")
    display.update(tally)
    display.close()
    assert "hello [1]" in out.getvalue()
    assert "3 act" in out.getvalue()


def test_quiet_is_quiet():
    out = io.StringIO()
    display = progress.make(Console(file=out), quiet=True)
    display.say("hello")
    display.update(Tally(1))
    display.close()
    assert out.getvalue() == ""
