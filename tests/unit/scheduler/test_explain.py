from __future__ import annotations

import pytest

from djinn.v1 import admin_service_pb2 as pb
from djinn.v1 import types_pb2 as types
from services.scheduler import explain
from services.scheduler.convert import operators as convert
from services.scheduler.policy.explanation import Explanation
from services.scheduler.policy.explanation import explain as explain_view
from services.scheduler.policy.view import SystemView
from tests.support.policy_views import session, worker


@pytest.fixture
def found() -> Explanation:
    system = SystemView({"w0": worker(free=0)})
    made = explain_view(session(expected_wake_s=130.0), system, 110.0)
    assert made is not None
    return made


def answer(**fields) -> pb.ExplainSessionResponse:
    told = types.Session(
        session_id="a",
        phase=types.AGENT_PHASE_IO_WAIT,
        tool_name="search",
        worker_id="w0",
        context_length=64,
        kv=types.KvResidency(total_blocks=4, device_blocks=1, host_blocks=4),
    )
    return pb.ExplainSessionResponse(session=told, policy="semantic", reason="waits", **fields)


def test_it_says_where_the_kv_is_when_the_agent_wakes_and_what_each_choice_costs(found):
    costs, forecast = convert.to_explanation(found)
    text = "\n".join(explain.lines(answer(costs=costs, forecast=forecast)))
    assert "a, IO_WAIT for search, on w0" in text
    assert "64 tokens, 4 blocks: 1 on the device (may be reused), 4 on the host" in text
    assert "semantic: waits" in text
    assert "10.000 s until now" in text
    assert "by hint" in text
    (best,) = (line for line in text.splitlines() if "costs least" in line)
    assert best.split()[0] == found.costs.best.value


def test_a_policy_that_weighs_nothing_has_no_costs():
    assert "weighs nothing" in "\n".join(explain.lines(answer()))


def test_without_its_worker_nothing_is_weighed():
    assert explain_view(session(), SystemView(), 110.0) is None


def test_the_numbers_go_to_the_wire_and_the_trace_alike(found):
    costs, forecast = convert.to_explanation(found)
    told = found.attributes()
    assert costs.evict_seconds == told["djinn.cost.evict_seconds"]
    assert costs.drop_seconds == told["djinn.cost.drop_seconds"]
    assert forecast.median_seconds == told["djinn.wait.median_seconds"]
    assert forecast.source == told["djinn.wait.source"] == "hint"


def test_a_wrong_command_line_is_one_line_and_exit_code_2(capsys):
    for argv in ([], ["a", "--address", "nowhere"]):
        with pytest.raises(SystemExit) as ended:
            explain.main(argv)
        assert ended.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
