import math

from services.scheduler.simulation.clock import Events


def test_actions_happen_in_order_of_time_and_then_of_asking():
    events = Events(5.0)
    happened: list[tuple[str, float]] = []

    def note(name: str) -> None:
        happened.append((name, events.now_s))

    for name, time_s in (("b", 7.0), ("a", 6.0), ("c", 7.0)):
        events.at(time_s, note, name)
    assert events.run(math.inf) == 3
    assert happened == [("a", 6.0), ("b", 7.0), ("c", 7.0)]
    assert events.next_s() == math.inf


def test_what_an_action_asks_for_happens_too():
    events = Events(0.0)
    seen: list[float] = []

    def again() -> None:
        seen.append(events.now_s)
        if events.now_s < 3.0:
            events.after(1.5, again)

    events.after(0.0, again)
    events.run(math.inf)
    assert seen == [0.0, 1.5, 3.0]


def test_nothing_happens_from_the_given_time_on_or_after_a_stop():
    events = Events(0.0)
    seen: list[int] = []
    events.at(1.0, seen.append, 1)
    events.at(2.0, seen.append, 2)
    assert events.run(2.0) == 1
    assert events.next_s() == 2.0
    events.at(2.0, events.stop)
    events.at(3.0, seen.append, 3)
    assert events.run(math.inf) == 2
    assert seen == [1, 2]
