"""The server's counters at the end of a run, once they have all that the run did."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

SETTLE_TIMEOUT_S = 5.0
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 0.4


async def settled(
    ask: Callable[[], Awaitable[dict[str, float]]], timeout_s: float = SETTLE_TIMEOUT_S
) -> tuple[dict[str, float], bool]:
    """Asks until the counters are of a time after this call.

    Each worker must have reported twice since: what the first report says may have been counted a
    moment before it was sent, and so before the end. All times that are compared are of the
    server's own clock.

    Args:
        ask: Returns the counters; empty: the server is away.
        timeout_s: Most seconds to go on asking.

    Returns:
        The last counters told, and whether they are known to be complete.
    """
    stats: dict[str, float] = {}
    after_s: float | None = None
    reports = 0
    pause_s = _FIRST_PAUSE_S
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                told = await ask()
                stats = told or stats
                if told:
                    answer_s = told.get("answer_time_s")
                    if answer_s is None:
                        # A server that does not say how old its counters are has them up to date.
                        return stats, True
                    if after_s is None:
                        after_s = answer_s
                    elif told.get("report_time_s", 0.0) > after_s:
                        reports += 1
                        after_s = answer_s
                        if reports == 2:
                            return stats, True
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
    except TimeoutError:
        return stats, False
