"""What a policy may be told at start, and how that is written on a command line."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, fields, replace
from typing import Final

from services.common.errors import ConfigError

_ON: Final = {"on": True, "off": False}


@dataclass(frozen=True, slots=True)
class PolicyOptions:
    """What a policy may be told at start.

    Those that are true or false are the parts of `semantic`, which can be switched off one by one.

    Attributes:
        idle_threshold_s: A session whose client never signalled counts as waiting for a tool once
            it has done nothing for this long.
        restore: A wake signal brings the KV back; off: the next Generate does.
        order: Workers are told when sessions are expected, and reuse the furthest first; off: the
            least recently used first.
        refresh: They are told again when that has changed much.
        prefetch: Sessions that are expected soon are brought back before they say so.
        drop: When both pools are full, what is cheapest to recompute is dropped; off: the worker
            drops what it has not used for longest.
        idle: Sessions whose clients are silent are let go of; off: only those that signal.
        admission: New sessions wait while the GPU has enough to do.
        backlog_s: `admission`: prompts that are let in and not computed yet take at most this long.
        recompute_share: `admission`: nobody new is let in while more than this share of a worker's
            time goes to prefilling lost KV again.
        ttl_s: `ttl`: how long KV is pinned after a tool call began.
        reserve_tokens: `static`: what is reserved for each session; 0: the longest context.
    """

    idle_threshold_s: float = 1.0
    restore: bool = True
    order: bool = True
    refresh: bool = True
    prefetch: bool = True
    drop: bool = True
    idle: bool = True
    admission: bool = True
    backlog_s: float = 5.0
    recompute_share: float = 0.5
    ttl_s: float = 5.0
    reserve_tokens: int = 0


def parse_options(
    texts: Iterable[str], base: PolicyOptions, policy: str, allowed: Collection[str]
) -> PolicyOptions:
    """Returns the options that the command line gives a policy.

    Args:
        texts: Each one ``name=value``; for a part ``on`` or ``off``.
        base: What is not given.
        policy: Name of the policy.
        allowed: The options that it has.

    Raises:
        ConfigError: One is not of that form, is not known to the policy, is given twice, or has a
            value that cannot be.
    """
    kinds = {column.name: type(column.default) for column in fields(PolicyOptions)}
    found: dict[str, bool | int | float] = {}
    for text in texts:
        flag = f"--policy-option {text}"
        written, equals, value = text.partition("=")
        name = written.replace("-", "_")
        if not equals:
            raise ConfigError(f"{flag}: not of the form name=value, such as prefetch=off")
        if name not in allowed:
            known = ", ".join(sorted(item.replace("_", "-") for item in allowed)) or "none"
            raise ConfigError(f"{flag}: policy {policy} has no such option; it has {known}")
        if name in found:
            raise ConfigError(f"{flag}: {written} is given twice")
        found[name] = _value(flag, value, kinds[name], name)
    return replace(base, **found)  # type: ignore[arg-type] # each has its own field's type


def _value(flag: str, value: str, kind: type, name: str) -> bool | int | float:
    if kind is bool:
        if value not in _ON:
            raise ConfigError(f"{flag}: {value!r} is neither on nor off")
        return _ON[value]
    try:
        number = int(value) if kind is int else float(value)
    except ValueError:
        raise ConfigError(f"{flag}: {value!r} is not a number") from None
    least_excluded = kind is float
    if not math.isfinite(number) or number < 0 or (least_excluded and number == 0):
        raise ConfigError(f"{flag}: {value} is not {'above' if least_excluded else 'at least'} 0")
    if name == "recompute_share" and number > 1:
        raise ConfigError(f"{flag}: {value} is a share and at most 1")
    return number
