"""What the policies promise against each other, on one workload in virtual time.

300 agents on two workers for about ten minutes, whose KV is four times what the device pools hold
and fits into both tiers, and the same again with a host tier that is far too small.
"""

from functools import cache

import pytest

from services.scheduler.policy.options import PolicyOptions
from services.scheduler.simulation.run import Simulation, Summary
from tests.support.simulated import (
    agents_of,
    population,
    quantile,
    requests_of,
    simulate,
    wakes_ms,
    worker_parameters,
)

AGENTS = 300
CYCLES = 5
POLICIES = ("semantic", "reactive-lru", "reactive-recompute", "ttl")
# Of each worker; 150 sessions on it grow to 53 blocks each.
DEVICE_BLOCKS = 2000
ENOUGH, SHORT = 12_000, 3_000


@cache
def run(policy: str, host_blocks: int) -> tuple[Simulation, Summary]:
    agents = population(AGENTS, CYCLES, tool_s=(60.0, 140.0))
    return simulate(agents, worker_parameters(DEVICE_BLOCKS, host_blocks), policy=policy, workers=2)


def wake_ms(policy: str, fraction: float) -> float:
    return quantile(wakes_ms(run(policy, ENOUGH)[0]), fraction)


@pytest.mark.parametrize("host_blocks", [ENOUGH, SHORT])
@pytest.mark.parametrize("policy", POLICIES)
def test_everyone_gets_to_the_end_and_no_session_is_lost(policy, host_blocks):
    simulation, summary = run(policy, host_blocks)
    assert not summary.interrupted
    assert [agent.failure for agent in agents_of(simulation)] == [None] * AGENTS
    assert len(requests_of(simulation)) == AGENTS * (CYCLES + 1)
    for worker in simulation.workers:
        worker.check_integrity()


def test_knowing_the_phase_beats_reacting_to_pressure():
    for other in ("reactive-lru", "ttl"):
        assert wake_ms("semantic", 0.5) < 0.7 * wake_ms(other, 0.5)
        assert wake_ms("semantic", 0.99) < wake_ms(other, 0.99)
    assert wake_ms("reactive-lru", 0.99) < 0.7 * wake_ms("reactive-recompute", 0.99)


def test_sessions_that_fit_into_both_tiers_are_never_computed_again():
    for policy in ("semantic", "reactive-lru", "ttl"):
        assert run(policy, ENOUGH)[1].stats_after["recomputed_tokens"] == 0
    assert run("reactive-recompute", ENOUGH)[1].stats_after["recomputed_tokens"] > 0


def test_a_small_host_tier_loses_time_and_less_of_it_when_wakes_are_known():
    semantic = run("semantic", SHORT)[1].stats_after["recomputed_tokens"]
    reactive = run("reactive-lru", SHORT)[1].stats_after["recomputed_tokens"]
    assert 0 < semantic < reactive


def test_static_reservations_have_the_others_wait():
    agents = population(60, 2)
    options = PolicyOptions(reserve_tokens=1024)
    parameters = worker_parameters(1000, 1000)
    simulation, _ = simulate(
        agents, parameters, policy="static", policy_options=options, live=False
    )
    done = agents_of(simulation)
    assert all(agent.failure is None for agent in done)
    # 1,000 blocks of 16 tokens are 15 reservations of 1,024.
    assert sum(agent.refusals for agent in done) > 0
    assert max(agent.opened_s - agent.scheduled_s for agent in done if agent.opened_s) > 10
