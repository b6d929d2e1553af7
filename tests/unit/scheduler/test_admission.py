from __future__ import annotations

import heapq
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.errors import ExhaustedError
from services.scheduler.admission import (
    MOST_RETRY_S,
    Admission,
    Applicant,
    Limits,
)
from services.scheduler.policy.room import UNLIMITED, Room

FULL = Room(0, 0, reason="16 requests at once")


class House:
    """Counts who is in."""

    def __init__(self, **limits) -> None:
        self.inside: dict[str, str] = {}
        self.admission = Admission(
            Limits(**limits),
            lambda: len(self.inside),
            lambda tenant: sum(other == tenant for other in self.inside.values()),
        )

    def knock(self, name, now_s=0.0, rooms=(UNLIMITED,), **fields) -> ExhaustedError | None:
        applicant = Applicant(name, **fields)
        try:
            self.admission.admit(applicant, rooms, now_s)
        except ExhaustedError as error:
            return error
        self.inside[name] = applicant.tenant_id
        return None

    def position(self, *args, **fields) -> int:
        error = self.knock(*args, **fields)
        return int(error.metadata["position"]) if error is not None else 0


def test_without_a_limit_everybody_is_let_in():
    house = House()
    assert all(house.knock(str(n)) is None for n in range(100))
    assert house.admission.admitted == 100
    assert len(house.admission) == 0


def test_at_the_limit_one_is_told_why_and_when_to_come_again():
    house = House(max_sessions=1)
    assert house.knock("a") is None
    error = house.knock("b")
    assert error is not None
    assert "1 sessions are open and the limit is 1" in error.message
    assert error.retry_after_s is not None
    assert 0 < error.retry_after_s <= MOST_RETRY_S
    assert error.metadata["position"] == error.metadata["queued"] == "1"


def test_whoever_came_first_is_first():
    house = House()
    assert house.position("a", 0.0, [FULL]) == 1
    assert house.position("b", 0.1, [FULL]) == 2
    assert house.position("a", 0.2, [FULL]) == 1
    assert len(house.admission) == 2
    one = Room(sessions=1)
    assert house.knock("b", 0.3, [one]) is not None
    assert house.knock("a", 0.4, [one]) is None
    assert house.knock("b", 0.5, [one]) is None


def test_a_place_that_is_free_is_not_lost_while_its_owner_is_on_the_way():
    house = House()
    for n in range(3):
        assert house.knock(str(n), 0.0, [FULL]) is not None
    two = Room(sessions=2)
    # The second is let in before the first has come again; the third is not.
    assert house.knock("1", 0.5, [two]) is None
    assert house.knock("2", 0.5, [Room(sessions=1)]) is not None
    assert house.knock("0", 0.5, [Room(sessions=1)]) is None


def test_who_does_not_come_again_loses_the_place():
    house = House()
    error = house.knock("gone", 0.0, [FULL])
    assert error is not None
    assert error.retry_after_s is not None
    assert house.position("b", 0.1, [FULL]) == 2
    late_s = 0.1 + 2 * error.retry_after_s + 1.0
    assert house.position("b", late_s, [FULL]) == 1


def test_a_priority_is_worth_so_much_waiting_and_no_more():
    house = House(aging_s=2.0)
    assert house.position("old", 0.0, [FULL]) == 1
    assert house.position("early", 1.0, [FULL], priority=1) == 1
    assert house.position("old", 1.5, [FULL]) == 2
    assert house.position("late", 2.5, [FULL], priority=1) == 3


def test_the_queue_is_bounded():
    house = House(max_queued=1)
    assert house.position("a", 0.0, [FULL]) == 1
    error = house.knock("b", 0.0, [FULL])
    assert error is not None
    assert "position" not in error.metadata
    assert error.retry_after_s == MOST_RETRY_S
    assert len(house.admission) == 1
    assert house.position("a", 0.5, [FULL]) == 1


def test_prompts_are_let_in_as_fast_as_they_are_computed():
    house = House()
    busy = Room(tokens=1000, tokens_per_s=500.0, reason="busy")
    assert house.knock("fits", 0.0, [busy], tokens=1000) is None
    error = house.knock("waits", 0.0, [busy], tokens=1500)
    assert error is not None
    assert error.retry_after_s == pytest.approx(1.0)
    behind = house.knock("behind", 0.0, [busy], tokens=500)
    assert behind is not None
    assert behind.retry_after_s == pytest.approx(2.0)
    # Room for both, though neither came first.
    assert house.knock("behind", 1.0, [Room(tokens=2000, reason="busy")], tokens=500) is None


def test_who_stands_in_the_way_is_named_where_the_workers_give_no_reason():
    house = House()
    assert house.knock("long", 0.0, [Room(tokens=1000, reason="busy")], tokens=1500) is not None
    behind = house.knock("behind", 0.0, [Room(tokens=1000)], tokens=500)
    assert behind is not None
    assert "the workers are busy: 2000 tokens of new prompts, and room for 1000;" in behind.message
    behind = house.knock("behind", 0.0, [Room(sessions=1)], tokens=500)
    assert behind is not None
    assert "the workers are full: 1 wait before it;" in behind.message


def test_several_workers_have_room_together():
    house = House()
    assert house.knock("a", 0.0, [FULL, Room(sessions=1)]) is None
    assert house.knock("b", 0.0, [FULL, FULL]) is not None


def test_who_waits_for_another_model_is_not_in_the_way():
    house = House()
    assert house.position("a", 0.0, [FULL], model="large") == 1
    assert house.knock("b", 0.0, [Room(sessions=1)], model="small") is None
    assert house.position("any", 0.0, [FULL]) == 2


def test_a_quota_is_each_tenants_own():
    house = House(quotas={"acme": 1, "*": 2})
    assert house.knock("a1", tenant_id="acme") is None
    error = house.knock("a2", tenant_id="acme")
    assert error is not None
    assert "tenant 'acme' has 1 sessions open and a quota of 1" in error.message
    assert error.metadata["position"] == "1"
    assert house.position("a3", tenant_id="acme") == 2
    # Those who wait for their quota are not in others' way.
    assert house.knock("b1", tenant_id="other") is None
    assert house.knock("b2", tenant_id="other") is None
    assert house.knock("b3", tenant_id="other") is not None
    del house.inside["a1"]
    assert house.knock("a3", tenant_id="acme") is not None
    assert house.knock("a2", tenant_id="acme") is None


AGENTS = st.lists(
    st.tuples(
        st.floats(0, 20),
        st.integers(-3, 3),
        st.sampled_from(["red", "green", "blue"]),
        st.integers(1, 3000),
    ),
    min_size=1,
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(AGENTS, st.integers(1, 3), st.integers(1, 4), st.floats(0.1, 3.0))
def test_everybody_gets_in_and_no_quota_is_ever_exceeded(agents, quota, places, stay_s):
    quotas = {"red": quota, "*": quota + 1}
    house = House(quotas=quotas, max_sessions=places + quota, aging_s=1.0)
    events: list[tuple[float, int, str, int]] = [
        (at_s, n, "knock", n) for n, (at_s, *_) in enumerate(agents)
    ]
    heapq.heapify(events)
    order = len(agents)
    waited: dict[int, float] = {}
    while events:
        now_s, _, what, n = heapq.heappop(events)
        order += 1
        name = str(n)
        if what == "leave":
            del house.inside[name]
            continue
        at_s, priority, tenant, tokens = agents[n]
        room = Room(places - len(house.inside), reason="places")
        error = house.knock(name, now_s, [room], priority=priority, tenant_id=tenant, tokens=tokens)
        if error is None:
            waited[n] = now_s - at_s
            heapq.heappush(events, (now_s + stay_s, order, "leave", n))
        else:
            assert error.retry_after_s is not None
            heapq.heappush(events, (now_s + error.retry_after_s, order, "knock", n))
        inside = Counter(house.inside.values())
        assert inside["red"] <= quota
        assert max(inside.values(), default=0) <= quota + 1
        assert len(house.inside) <= places
        assert now_s < 10_000, "somebody starves"
    assert len(waited) == len(agents)
    assert len(house.admission) == 0


def test_under_a_stream_of_higher_priorities_the_lowest_still_gets_in():
    house = House(aging_s=1.0)
    now_s, let_in_s = 0.0, None
    assert house.knock("humble", 0.0, [FULL], priority=-5) is not None
    for n in range(200):
        now_s += 0.5
        # Each time one place, and somebody important who has just come.
        rival = house.knock(f"r{n}", now_s, [Room(sessions=1)], priority=5)
        if (
            rival is not None
            and house.knock("humble", now_s, [Room(sessions=1)], priority=-5) is None
        ):
            let_in_s = now_s
            break
        house.knock("humble", now_s, [FULL], priority=-5)
    assert let_in_s is not None
    # Ten points apart, one second each.
    assert let_in_s <= 10.5
