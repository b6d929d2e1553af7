"""The search for the largest population that is served well: doubling, then bisection."""

from __future__ import annotations

from collections.abc import Mapping


def largest(found: Mapping[int, bool]) -> int:
    """Returns the largest population that was served well below all that were not; 0: none."""
    limit = min((agents for agents, well in found.items() if not well), default=None)
    return max((n for n, well in found.items() if well and (limit is None or n < limit)), default=0)


def next_population(
    found: Mapping[int, bool], *, start: int, most: int, tolerance: float
) -> int | None:
    """Returns which population to try next.

    A function of what has been found alone, so a search that was stopped goes on where it was. It
    takes for granted that fewer agents are served at least as well: what lies above a failure is
    not tried, and not counted if it was.

    Args:
        found: Populations that were tried, and whether they were served well.
        start: The first one to try.
        most: Never try more.
        tolerance: End when the bounds are this close, relative to the lower one.

    Returns:
        A population of at least 1; None: the search has ended.
    """
    if not found:
        return min(start, most)
    low = largest(found)
    failed = [agents for agents, well in found.items() if not well]
    if not failed:
        return None if low >= most else min(2 * low, most)
    high = min(failed)
    if high - low <= max(1.0, tolerance * low):
        return None
    # With no success yet, halving comes down as fast as doubling goes up.
    return (low + high) // 2
