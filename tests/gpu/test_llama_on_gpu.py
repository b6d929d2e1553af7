"""The fused forward pass, FlashInfer and CUDA graphs on a GPU, against transformers and eager."""

from __future__ import annotations

from array import array

import pytest
import torch

from services.worker.engine.model_runner import LaunchedStep
from services.worker.engine.step import SampleRequest, SequenceSlice, StepPlan
from services.worker.messages import SamplingParams
from tests.support.gpu_models import BLOCK_SIZE, GREEDY, PROMPTS, generate, make, make_runner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("Llama", {"num_key_value_heads": 4}),
        ("Qwen2", {"num_key_value_heads": 2, "num_attention_heads": 2}),
        ("Qwen3", {"num_key_value_heads": 2}),
    ],
)
def test_float32_tokens_are_those_of_transformers(kind: str, settings: dict[str, object]) -> None:
    loaded = make(kind, torch.float32, initializer_range=0.2, **settings)
    runner = make_runner(loaded)
    assert runner.attention_name == "sdpa"
    runner.warm_up()
    made, _ = generate(runner, PROMPTS, 16, GREEDY)
    loaded.model.set_attn_implementation("sdpa")
    for prompt, tokens in zip(PROMPTS, made, strict=True):
        ids = torch.tensor([prompt], device="cuda")
        out = loaded.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False
        )
        assert out[0, len(prompt) :].tolist() == tokens


@pytest.mark.parametrize(("kind", "kv_heads"), [("Llama", 4), ("Qwen3", 1), ("Mistral", 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_like_transformers(kind: str, kv_heads: int, dtype: torch.dtype) -> None:
    settings = {"sliding_window": None} if kind == "Mistral" else {}
    loaded = make(kind, dtype, num_key_value_heads=kv_heads, **settings)
    runner = make_runner(loaded)
    assert runner.attention_name == "flashinfer"
    runner.warm_up()
    made, logits = generate(runner, PROMPTS[:1], 8, GREEDY)
    loaded.model.set_attn_implementation("sdpa")
    ids = torch.tensor([PROMPTS[0] + made[0][:-1]], device="cuda")
    expected = loaded.model(input_ids=ids, use_cache=False).logits[0, len(PROMPTS[0]) - 1 :]
    for ours, theirs in zip(logits[0], expected.float().cpu(), strict=True):
        assert torch.cosine_similarity(ours, theirs, dim=0) > 0.995


@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("params", [GREEDY, SamplingParams(temperature=0.8, top_k=40, seed=3)])
def test_graphs_give_what_eager_steps_give(kv_heads: int, params: SamplingParams) -> None:
    loaded = make("Llama", torch.bfloat16, num_key_value_heads=kv_heads)
    captured = make_runner(loaded, max_running_sequences=12)
    captured.warm_up()
    assert captured._graphs is not None
    eager = make_runner(loaded)
    made, logits = generate(captured, PROMPTS, 24, params)
    for prompt, tokens, rows in zip(PROMPTS, made, logits, strict=True):
        text = prompt + tokens[:-1]
        table = array("i", range(-(-len(text) // BLOCK_SIZE)))
        wanted = SampleRequest(params, len(text), return_logits=True)
        part = SequenceSlice(text, 0, table, wanted)
        (sample,) = eager.launch(StepPlan((part,))).result().samples
        assert sample is not None
        assert sample.logits is not None
        expected = torch.frombuffer(bytearray(sample.logits), dtype=torch.float32)
        assert torch.cosine_similarity(rows[-1], expected, dim=0) > 0.995


def test_steps_launched_ahead_of_each_other_give_the_same() -> None:
    loaded = make("Llama", torch.bfloat16, num_key_value_heads=4)
    runner = make_runner(loaded, max_running_sequences=8)
    runner.warm_up()
    tables = [array("i", [3 * i, 3 * i + 1, 3 * i + 2]) for i in range(8)]
    plans = [
        StepPlan(
            tuple(
                SequenceSlice([i + 1] * new, start, tables[i], SampleRequest(GREEDY, start + new))
                for i in range(count)
            )
        )
        for count, start, new in ((8, 0, 33), (3, 33, 1), (8, 33, 1), (1, 34, 9), (5, 34, 1))
    ]
    alone = [runner.launch(plan).result() for plan in plans]
    ahead = [step.result() for step in [runner.launch(plan) for plan in plans]]
    assert [step.samples for step in ahead] == [step.samples for step in alone]
    assert not any(step.failed for step in ahead + alone)


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(temperature=0.8, top_k=40, seed=3)])
def test_steps_that_follow_each_other_give_what_they_give_one_by_one(
    params: SamplingParams,
) -> None:
    loaded = make("Llama", torch.bfloat16, num_key_value_heads=4)
    runner = make_runner(loaded, max_running_sequences=8)
    runner.warm_up()
    count, length, new = 5, 20, 12
    tables = [array("i", [2 * i, 2 * i + 1]) for i in range(count)]
    prompts = StepPlan(
        tuple(
            SequenceSlice([i + 1] * length, 0, tables[i], SampleRequest(params, length))
            for i in range(count)
        )
    )

    def decodes(step: int, tokens: list[int] | None) -> StepPlan:
        """Decodes of all, from these tokens or from those of the step before."""
        place = length + step
        return StepPlan(
            tuple(
                SequenceSlice(
                    [0 if tokens is None else tokens[i]],
                    place,
                    tables[i],
                    SampleRequest(params, place + 1),
                    follows=i if tokens is None else None,
                )
                for i in range(count)
            )
        )

    def tokens_of(step: LaunchedStep) -> list[int]:
        return [sample.token_id for sample in step.result().samples if sample is not None]

    alone = [tokens_of(runner.launch(prompts))]
    for step in range(new):
        alone.append(tokens_of(runner.launch(decodes(step, alone[-1]))))
    ahead = [runner.launch(prompts), *(runner.launch(decodes(step, None)) for step in range(new))]
    assert [tokens_of(step) for step in ahead] == alone
