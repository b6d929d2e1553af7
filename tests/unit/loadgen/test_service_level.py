import pytest

from loadgen import service_level
from loadgen.errors import LoadgenError
from loadgen.service_level import Term

RESULTS = {"p99_wake_latency_ms": 240.0, "p99_latency_ms": 2000.0, "failed_count": 0.0}


def test_a_level_is_a_list_of_bounds():
    terms = service_level.parse("p99_wake_ms<=250, p99_latency_ms < 2e3 ,requests_per_s>=1.5")
    assert terms == (
        Term("p99_wake_ms", "<=", 250.0),
        Term("p99_latency_ms", "<", 2000.0),
        Term("requests_per_s", ">=", 1.5),
    )
    assert (
        ", ".join(map(str, terms)) == "p99_wake_ms<=250, p99_latency_ms<2000, requests_per_s>=1.5"
    )


@pytest.mark.parametrize(
    ("text", "met"),
    [
        ("p99_wake_ms<=240", True),
        ("p99_wake_ms<240", False),
        ("p99_wake_ms<=240,p99_request_ms<=1999", False),
        ("p99_wake_ms>100,failed<=0", True),
        ("p99_itl_ms<=1000", False),
    ],
)
def test_every_bound_must_hold_and_have_a_value(text, met):
    checks = service_level.check(service_level.parse(text), RESULTS)
    assert service_level.met(checks) is met


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected NAME<=NUMBER, such as p99_wake_ms<=250, got ''"),
        ("p99_wake_ms=250", "got 'p99_wake_ms=250'"),
        ("failed<=0,", "got ''"),
        ("p99_wake<=250", "unknown result p99_wake; did you mean p99_wake_ms?"),
        ("failed<=none", "failed: not a number: 'none'"),
        ("failed<=nan", "failed: not a number: 'nan'"),
    ],
)
def test_what_is_malformed_is_said_in_one_line(text, message):
    with pytest.raises(LoadgenError) as caught:
        service_level.parse(text)
    assert str(caught.value).startswith("--service-level: ")
    assert message in str(caught.value)
