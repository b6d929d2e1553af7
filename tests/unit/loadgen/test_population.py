from hypothesis import given
from hypothesis import strategies as st

from loadgen import population


def search(limit, *, start, most=10_000, tolerance=0.05, found=None):
    """Returns what was tried, where all up to `limit` agents are served well."""
    found = dict(found or {})
    while True:
        agents = population.next_population(found, start=start, most=most, tolerance=tolerance)
        if agents is None:
            return found
        assert 1 <= agents <= most
        assert agents not in found
        found[agents] = agents <= limit


def test_it_doubles_and_then_bisects():
    assert list(search(50, start=8, tolerance=0)) == [8, 16, 32, 64, 48, 56, 52, 50, 51]


def test_a_start_that_is_too_large_is_halved():
    assert list(search(3, start=16, tolerance=0)) == [16, 8, 4, 2, 3]


def test_none_may_be_served_well():
    found = search(0, start=16)
    assert list(found) == [16, 8, 4, 2, 1]
    assert population.largest(found) == 0


def test_it_stops_at_the_most():
    found = search(10**9, start=8, most=20)
    assert list(found) == [8, 16, 20]
    assert population.largest(found) == 20
    assert list(search(10**9, start=50, most=20)) == [20]


def test_what_lies_above_a_failure_does_not_count():
    assert population.largest({8: True, 16: False, 32: True}) == 8


@given(limit=st.integers(1, 5000), start=st.integers(1, 5000), tolerance=st.floats(0.0, 0.3))
def test_it_ends_within_the_tolerance(limit, start, tolerance):
    found = search(limit, start=start, tolerance=tolerance)
    largest = population.largest(found)
    assert largest <= limit
    assert limit - largest <= max(1.0, tolerance * largest)
    assert len(found) <= 30


@given(limit=st.integers(1, 500), start=st.integers(1, 500), done=st.integers(0, 12))
def test_a_search_that_was_stopped_goes_on_as_it_would_have(limit, start, done):
    whole = search(limit, start=start)
    part = dict(list(whole.items())[:done])
    assert search(limit, start=start, found=part) == whole
