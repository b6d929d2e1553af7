"""Small simulations for tests."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from services.scheduler.config import SchedulerConfig
from services.scheduler.policy.options import PolicyOptions
from services.scheduler.simulation.parameters import Latencies, StepTimes, WorkerParameters
from services.scheduler.simulation.result import AgentRecord, RequestRecord
from services.scheduler.simulation.run import Options, Simulation, Summary
from services.scheduler.simulation.trace import TracedAgent, TracedStep

BLOCK_TOKENS = 16
TOKEN_BYTES = 1 << 19


def worker_parameters(
    device_blocks: int = 400, host_blocks: int = 2000, **changes
) -> WorkerParameters:
    """Returns a worker about as fast as one GPU with Llama-2-7B, with pools of the sizes given."""
    settings: dict[str, Any] = {
        "source": "made up",
        "model": "tiny",
        "block_size_tokens": BLOCK_TOKENS,
        "kv_bytes_per_token": TOKEN_BYTES,
        "device_pool_bytes": device_blocks * BLOCK_TOKENS * TOKEN_BYTES,
        "host_pool_bytes": host_blocks * BLOCK_TOKENS * TOKEN_BYTES,
        "max_context_length": 4096,
        "load_bytes_per_s": 53e9,
        "store_bytes_per_s": 53e9,
        "both_ways_bytes_per_s": 50e9,
        "copy_latency_s": 0.0002,
        "step": StepTimes(
            rows=[(1, 0.004), (64, 0.005), (256, 0.008), (1024, 0.024)],
            kv_read_bytes_per_s=4.3e12,
            overhead_s=0.001,
        ),
        "latencies": Latencies(
            signal_s=0.0005, command_s=0.0005, event_s=0.0005, submit_s=0.0015, return_s=0.001
        ),
    }
    return WorkerParameters(**(settings | changes))


def population(
    agents: int,
    cycles: int,
    *,
    tokens: int = 512,
    rate: float = 20.0,
    tool_s: tuple[float, float] = (10.0, 20.0),
    seed: int = 0,
) -> list[TracedAgent]:
    """Returns agents that arrive at random and whose tools take a time between two."""
    numbers = random.Random(seed)
    arrival_s = 0.0
    made = []
    for index in range(agents):
        arrival_s += numbers.expovariate(rate)
        steps = [TracedStep(tokens, 30)]
        steps += [TracedStep(32, 30, "search", numbers.uniform(*tool_s)) for _ in range(cycles)]
        made.append(TracedAgent(f"agent-{index:04d}", arrival_s, "", 0, False, steps))
    return made


def simulate(
    agents: list[TracedAgent],
    parameters: WorkerParameters,
    *,
    policy: str = "semantic",
    workers: int = 1,
    policy_options: PolicyOptions | None = None,
    **options,
) -> tuple[Simulation, Summary]:
    """Runs a simulation to its end, with its records in memory."""
    config = SchedulerConfig(policy=policy)
    if policy_options is not None:
        config = replace(config, policy_options=policy_options)
    simulation = Simulation(agents, config, parameters, Options(workers=workers, **options))
    return simulation, simulation.run()


def requests_of(simulation: Simulation) -> list[RequestRecord]:
    """Returns the requests that a simulation has recorded."""
    return [record for record in simulation.records if isinstance(record, RequestRecord)]


def agents_of(simulation: Simulation) -> list[AgentRecord]:
    """Returns the agents that a simulation has recorded."""
    return [record for record in simulation.records if isinstance(record, AgentRecord)]


def wakes_ms(simulation: Simulation) -> list[float]:
    """Returns the wake latencies in milliseconds, in rising order."""
    return sorted(
        (request.first_token_s - request.compute_s) * 1e3
        for request in requests_of(simulation)
        if request.compute_s is not None and request.first_token_s is not None
    )


def quantile(ordered: list[float], fraction: float) -> float:
    """Returns a quantile of values in rising order."""
    return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))]
