from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.scheduler.wake_order import WakeOrder

IDS = st.sampled_from(["a", "b", "c", "d", "e"])
WORKERS = st.sampled_from(["w0", "w1"])
WAKES = st.none() | st.floats(0, 100)


def test_either_end_can_be_looked_at():
    order = WakeOrder()
    for name, wake_s in (("far", 30.0), ("near", 10.0), ("never", None), ("middle", 20.0)):
        order.set(name, "w0", wake_s)
    assert list(order.nearest("w0")) == ["near", "middle", "far", "never"]
    assert list(order.furthest("w0")) == ["never", "far", "middle", "near"]
    assert order.middle_s("w0") == 30.0
    assert list(order.nearest("w1")) == []
    assert order.middle_s("w1") is None


def test_the_middle_of_those_nothing_is_known_of_is_unknown():
    order = WakeOrder()
    order.set("a", "w0", None)
    assert order.middle_s("w0") is None


@given(st.lists(st.tuples(st.booleans(), IDS, WORKERS, WAKES), max_size=60))
def test_it_is_a_sorted_map(changes):
    order = WakeOrder()
    truth: dict[str, tuple[str, float]] = {}
    for put, name, worker, wake_s in changes:
        if put:
            order.set(name, worker, wake_s)
            truth[name] = (worker, float("inf") if wake_s is None else wake_s)
        else:
            order.remove(name)
            truth.pop(name, None)
    assert len(order) == len(truth)
    assert set(order.workers()) == {worker for worker, _ in truth.values()}
    for worker in ("w0", "w1"):
        expected = sorted((wake, name) for name, (at, wake) in truth.items() if at == worker)
        assert list(order.nearest(worker)) == [name for _, name in expected]
        assert list(order.furthest(worker)) == [name for _, name in reversed(expected)]
    assert all((name in order) == (name in truth) for name in ("a", "b", "c", "d", "e"))
