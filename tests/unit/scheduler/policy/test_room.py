from __future__ import annotations

import math

from services.scheduler.policy import cost
from services.scheduler.policy.room import work_room
from tests.support.policy_views import worker


def room(**fields):
    return work_room(worker(**fields), backlog_s=5.0, recompute_share=0.5)


def test_an_idle_worker_takes_what_it_can_compute_in_time():
    found = room()
    assert (found.tokens, found.tokens_per_s, found.reason) == (5000, 1e3, "")
    assert found.sessions == math.inf


def test_an_idle_worker_takes_one_prompt_however_long():
    assert room(max_context_length=32_768).tokens == 32_768


def test_prompts_under_way_leave_less_room():
    found = room(prompt_tokens=4000)
    assert found.tokens == 1000
    assert "4000 tokens" in found.reason
    assert room(prompt_tokens=9000).tokens == 0


def test_a_speed_that_is_not_measured_is_assumed():
    found = room(prefill_tokens_per_s=0.0)
    assert found.tokens == 5 * cost.ASSUMED_PREFILL_TOKENS_PER_S


def test_the_running_set_is_bounded_with_what_came_since_the_last_report():
    busy = {"max_running_sequences": 8, "running_sequences": 8, "waiting_requests": 4}
    assert room(**busy, opened=3).sessions == 1
    full = room(**busy, opened=4)
    assert (full.sessions, full.tokens) == (0, 0)
    assert "16 requests" in full.reason


def test_nobody_is_let_in_while_lost_kv_is_recomputed():
    assert room(recompute_share=0.4).tokens == 5000
    thrashing = room(recompute_share=0.6)
    assert (thrashing.sessions, thrashing.tokens) == (0, 0)
    assert "60%" in thrashing.reason
