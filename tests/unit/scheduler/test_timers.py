from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.scheduler.timers import Timers

keys = st.sampled_from("abcdef")
steps = st.lists(
    st.one_of(
        st.tuples(st.just("set"), keys, st.integers(0, 20)),
        st.tuples(st.just("cancel"), keys, st.just(0)),
        st.tuples(st.just("take"), st.just(""), st.integers(0, 20)),
    ),
    max_size=60,
)


@given(steps)
def test_it_does_what_a_plain_dictionary_would(taken_steps):
    timers = Timers()
    plain: dict[str, float] = {}
    for kind, key, number in taken_steps:
        if kind == "set":
            timers.set(key, number)
            plain[key] = number
        elif kind == "cancel":
            timers.cancel(key)
            plain.pop(key, None)
        else:
            due = sorted((at, name) for name, at in plain.items() if at <= number)
            assert [(plain[name], name) for name in timers.take_due(number)] == due
            for _, name in due:
                del plain[name]
        assert len(timers) == len(plain)
        assert timers.next_s() == min(plain.values(), default=None)


def test_a_key_set_again_many_times_does_not_pile_up():
    timers = Timers()
    for moment in range(10_000):
        timers.set("a", float(moment))
    assert len(timers._heap) <= 65
    assert list(timers.take_due(1e9)) == ["a"]


def test_a_key_set_again_while_taken_is_yielded_again():
    timers = Timers()
    timers.set("a", 1.0)
    taken = []
    for key in timers.take_due(5.0):
        taken.append(key)
        if len(taken) < 3:
            timers.set(key, 2.0)
    assert taken == ["a", "a", "a"]
