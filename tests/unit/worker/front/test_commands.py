from __future__ import annotations

from services.common.errors import InvalidRequestError
from services.worker import messages
from services.worker.front.commands import CommandDesk
from tests.support.stand_ins import command_done


class Bench:
    def __init__(self, remember: int = 10) -> None:
        self.sent: list[messages.ToEngine] = []
        self.told: list[messages.CommandDone] = []
        self.now_ns = 1_000
        self.desk = CommandDesk(
            self.sent.append, self.told.append, clock_ns=lambda: self.now_ns, remember=remember
        )

    def command(self, command_id: str = "c", **fields: object) -> messages.Command:
        return messages.Command(command_id, "s", messages.Evict(), **fields)  # type: ignore[arg-type]


def test_a_command_is_done_once_and_told_each_time_it_is_asked_for() -> None:
    bench = Bench()
    command = bench.command()
    assert not bench.desk.repeat("c")
    bench.desk.take(command, "trace")
    assert bench.desk.repeat("c")
    assert bench.told == []
    assert bench.desk.done(command_done()) == (command, "trace")
    assert bench.told == [command_done()]
    assert bench.desk.repeat("c")
    assert bench.told == [command_done(), command_done()]
    assert bench.sent == [command]


def test_a_refusal_is_remembered_if_it_has_an_id() -> None:
    bench = Bench()
    bench.desk.refuse("c", "s", InvalidRequestError("bad"))
    assert bench.desk.repeat("c")
    assert [done.error and done.error.code for done in bench.told] == ["INVALID_ARGUMENT"] * 2
    bench.desk.refuse("", "s", InvalidRequestError("bad"))
    assert not bench.desk.repeat("")


def test_the_results_asked_for_least_lately_are_forgotten() -> None:
    bench = Bench(remember=2)
    for command_id in ("a", "b"):
        bench.desk.take(bench.command(command_id))
        bench.desk.done(command_done(command_id))
    assert bench.desk.repeat("a")
    bench.desk.take(bench.command("c"))
    bench.desk.done(command_done("c"))
    assert bench.desk.repeat("a")
    assert not bench.desk.repeat("b")


def test_a_result_nobody_here_asked_for_is_passed_on() -> None:
    bench = Bench()
    assert bench.desk.done(command_done("x")) is None
    assert bench.told == [command_done("x")]
