"""A service level: what a run must show for its users to be content."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import msgspec

from loadgen import expectations
from loadgen.config_problems import hint
from loadgen.errors import LoadgenError
from loadgen.expectations import Check, Verdict

SHORT_NAMES: Mapping[str, str] = {
    "p50_wake_ms": "p50_wake_latency_ms",
    "p90_wake_ms": "p90_wake_latency_ms",
    "p99_wake_ms": "p99_wake_latency_ms",
    "p50_request_ms": "p50_latency_ms",
    "p90_request_ms": "p90_latency_ms",
    "p99_request_ms": "p99_latency_ms",
    "failed": "failed_count",
    "requests_per_s": "throughput_ops_per_sec",
}
_RELATIONS = {"<=": "_le", ">=": "_ge", "<": "_lt", ">": "_gt"}
_TERM = re.compile(r"\s*(?P<name>[A-Za-z0-9_]+)\s*(?P<relation><=|>=|<|>)\s*(?P<bound>\S+)\s*")


class Term(msgspec.Struct, frozen=True):
    """One bound.

    Attributes:
        name: The result, as it was written.
        relation: ``"<="``, ``">="``, ``"<"`` or ``">"``.
        bound: In the result's unit.
    """

    name: str
    relation: str
    bound: float

    def __str__(self) -> str:
        return f"{self.name}{self.relation}{self.bound:g}"


def parse(text: str) -> tuple[Term, ...]:
    """Returns the bounds of a text such as ``p99_wake_ms<=250,failed<=0``.

    Names are those of `SHORT_NAMES` and of `expectations.RESULTS`.

    Raises:
        LoadgenError: It is malformed; the message says where.
    """
    terms = []
    for part in text.split(","):
        match = _TERM.fullmatch(part)
        if match is None:
            raise LoadgenError(
                f"--service-level: expected NAME<=NUMBER, such as p99_wake_ms<=250, got {part!r}"
            )
        name = match["name"]
        if SHORT_NAMES.get(name, name) not in expectations.RESULTS:
            known = (*SHORT_NAMES, *expectations.RESULTS)
            raise LoadgenError(f"--service-level: unknown result {name}{hint(name, known)}")
        try:
            bound = float(match["bound"])
        except ValueError:
            bound = math.nan
        if not math.isfinite(bound):
            raise LoadgenError(f"--service-level: {name}: not a number: {match['bound']!r}")
        terms.append(Term(name, match["relation"], bound))
    return tuple(terms)


def check(terms: Sequence[Term], results: Mapping[str, float | None]) -> list[Check]:
    """Checks a run's results.

    Clients that took their times late only make latencies longer. So a bound that such a run meets
    is met, and this does not ask for valid latencies as a report's verdicts do.

    Args:
        terms: The bounds.
        results: Aggregates by name, as of `metrics.compute`.
    """
    return [
        expectations.check(
            SHORT_NAMES.get(term.name, term.name) + _RELATIONS[term.relation],
            term.bound,
            results,
            "",
        )
        for term in terms
    ]


def met(checks: Sequence[Check]) -> bool:
    """Returns whether every bound holds; one whose result does not exist does not."""
    return all(check.verdict is Verdict.PASS for check in checks)
