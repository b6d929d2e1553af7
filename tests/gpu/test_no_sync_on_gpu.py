"""A step is launched without waiting for the GPU, whatever computes it."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import pytest
import torch

from services.worker.engine.step import SampleRequest, SequenceSlice, StepPlan
from services.worker.messages import SamplingParams
from tests.support.gpu_models import make, make_runner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning"),
]

DRAWN = SamplingParams(temperature=0.8, top_k=20, top_p=0.9, seed=1)


@pytest.fixture(autouse=True)
def waiting_is_allowed_again() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def plans(params: SamplingParams) -> list[StepPlan]:
    """Prompts, decodes, an append, all at once, and more tokens than any graph takes."""
    tables = [array("i", range(40 * i, 40 * i + 40)) for i in range(6)]

    def part(i: int, start: int, new: int) -> SequenceSlice:
        wanted = SampleRequest(params, start + new)
        return SequenceSlice([i + 1] * new, start, tables[i], wanted)

    return [
        StepPlan(tuple(parts))
        for parts in (
            [part(i, 0, 20 + i) for i in range(4)],
            [part(i, 20 + i, 1) for i in range(3)],
            [part(0, 21, 32)],
            [part(0, 53, 1), part(1, 22, 1), part(2, 0, 100)],
            [part(5, 0, 600)],
        )
    ]


@pytest.mark.parametrize("params", [SamplingParams(), DRAWN])
@pytest.mark.parametrize(
    ("kv_heads", "warm", "any_model"),
    [(4, True, False), (1, True, False), (4, False, False), (4, False, True), (4, True, True)],
)
def test_no_launch_waits(
    kv_heads: int, warm: bool, any_model: bool, params: SamplingParams
) -> None:
    loaded = make("Llama", torch.bfloat16, num_key_value_heads=kv_heads)
    runner = make_runner(loaded, max_running_sequences=4, any_model=any_model)
    if warm:
        runner.warm_up()
    assert (runner._graphs is not None) == warm
    steps = plans(params)
    for plan in steps:
        runner.launch(plan).result()
    torch.cuda.set_sync_debug_mode("error")
    launched = [runner.launch(plan) for plan in steps]
    torch.cuda.set_sync_debug_mode("default")
    for plan, step in zip(steps, launched, strict=True):
        assert all(sample is not None for sample in step.result().samples), plan
