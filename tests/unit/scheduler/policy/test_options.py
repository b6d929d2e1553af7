from __future__ import annotations

import pytest

from services.common.errors import ConfigError
from services.scheduler.policy.base import registry
from services.scheduler.policy.options import PolicyOptions, parse_options

BASE = PolicyOptions()


def parsed(*texts: str, policy: str = "semantic") -> PolicyOptions:
    return parse_options(texts, BASE, policy, registry()[policy].heeds)


def test_without_any_the_defaults_hold():
    assert parsed() == BASE


def test_each_part_can_be_switched_off():
    parts = ("restore", "order", "refresh", "prefetch", "drop", "idle", "admission")
    found = parsed(*(f"{part}=off" for part in parts))
    assert not any(getattr(found, part) for part in parts)
    assert parsed("prefetch=on") == BASE


def test_numbers_are_taken():
    assert parsed("backlog-s=2.5", "recompute-share=1").backlog_s == 2.5
    assert parsed("ttl-s=3", policy="ttl").ttl_s == 3.0
    assert parsed("reserve-tokens=4096", policy="static").reserve_tokens == 4096


@pytest.mark.parametrize(
    ("policy", "text", "said"),
    [
        ("semantic", "prefetch", "not of the form"),
        ("semantic", "prefetch=maybe", "neither on nor off"),
        ("semantic", "nope=off", "has no such option; it has admission, backlog-s, drop"),
        ("semantic", "ttl-s=3", "policy semantic has no such option"),
        ("reactive-lru", "prefetch=off", "it has none"),
        ("semantic", "backlog-s=0", "not above 0"),
        ("semantic", "backlog-s=nan", "not above 0"),
        ("semantic", "backlog-s=soon", "not a number"),
        ("semantic", "recompute-share=1.5", "at most 1"),
        ("static", "reserve-tokens=-1", "not at least 0"),
        ("static", "reserve-tokens=1.5", "not a number"),
    ],
)
def test_a_wrong_one_is_refused_by_name(policy, text, said):
    with pytest.raises(ConfigError, match=f"--policy-option {text}.*{said}"):
        parsed(text, policy=policy)


def test_one_given_twice_is_refused():
    with pytest.raises(ConfigError, match="given twice"):
        parsed("drop=off", "drop=on")
