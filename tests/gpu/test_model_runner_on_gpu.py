"""The model runner on a GPU: same tokens as on the CPU's sampler, and no waiting in a launch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from services.worker.config import EngineConfig
from services.worker.engine.cuda_streams import CudaStream
from services.worker.engine.kv_layout import KVLayout
from services.worker.engine.model_loader import LoadedModel, load
from services.worker.engine.model_runner import ModelRunner
from services.worker.engine.sampler import SamplingBatch, sample
from services.worker.engine.step import SampleRequest, SequenceSlice, StepPlan
from services.worker.messages import SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture
def loaded() -> LoadedModel:
    config = EngineConfig(model="dummy:tiny", device="cuda", dtype="float32")
    return load(config, lambda _what, _done: None)


@pytest.fixture
def runner(loaded: LoadedModel) -> ModelRunner:
    layout = KVLayout(loaded.num_layers, 16, loaded.num_kv_heads, loaded.head_dim, loaded.dtype)
    pool = torch.zeros((64, layout.block_bytes), dtype=torch.uint8, device="cuda")
    return ModelRunner(loaded, layout, layout.view(pool), CudaStream(loaded.device))


@pytest.fixture
def no_waiting() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_launching_a_step_never_waits_for_the_gpu(runner: ModelRunner, no_waiting: None) -> None:
    runner.warm_up()
    sampling = SamplingParams(temperature=0.8, top_k=20, top_p=0.9, seed=1)
    plans = [
        StepPlan(
            (
                SequenceSlice([5], 40 if step else 0, [1, 2, 3], SampleRequest(sampling, 41)),
                SequenceSlice([7], 90 if step else 0, [4, 5, 6, 7, 8, 9], None),
                SequenceSlice([9], 8, [10], SampleRequest(SamplingParams(), 9, logprobs=2)),
                SequenceSlice(list(range(30)), 20 * step, [11, 12, 13, 14], None),
                SequenceSlice([3] * 9, 0, [15], SampleRequest(sampling, 9, return_logits=True)),
            )
        )
        for step in range(2)
    ]
    for plan in plans:
        runner.launch(plan).result()
    torch.cuda.set_sync_debug_mode("error")
    launched = [runner.launch(plan) for plan in plans]
    torch.cuda.set_sync_debug_mode("default")
    for step in launched:
        samples = step.result().samples
        assert [part is None for part in samples] == [False, True, False, True, False]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=1.3, seed=5),
        SamplingParams(temperature=0.7, top_k=40, top_p=0.9, seed=2**63 + 11),
    ],
)
def test_the_sampler_chooses_as_on_the_cpu(params: SamplingParams) -> None:
    logits = torch.randn(64, 5000, generator=torch.Generator().manual_seed(0)) * 2
    batch = SamplingBatch([params] * 64, range(64))
    assert sample(logits.cuda(), batch).tolist() == sample(logits, batch).tolist()
