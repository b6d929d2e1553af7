"""The fused forward pass, FlashInfer and CUDA graphs on a GPU, against transformers and eager."""

from __future__ import annotations

import dataclasses
import random
from array import array

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from services.worker.engine.cuda_streams import CudaStream
from services.worker.engine.kv_layout import KVLayout
from services.worker.engine.model_loader import LoadedModel
from services.worker.engine.model_runner import ModelRunner
from services.worker.engine.models.any import ATTENTION_NAME, register_attention
from services.worker.engine.step import SampleRequest, SequenceSlice, StepPlan
from services.worker.messages import SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

BLOCK_SIZE = 16
SHAPE = {
    "vocab_size": 640,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 1024,
    "initializer_range": 0.05,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": None,
}


def make(kind: str, dtype: torch.dtype, **settings: object) -> LoadedModel:
    register_attention()
    config = getattr(transformers, kind + "Config")(**(SHAPE | settings))
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(
        config, dtype=dtype, attn_implementation=ATTENTION_NAME
    )
    return LoadedModel(
        model=model.cuda().eval(),
        name=kind,
        vocab_size=config.vocab_size,
        max_context_length=1024,
        eos_token_ids=(),
        num_layers=config.num_hidden_layers,
        num_query_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=128,
        dtype=dtype,
        device=torch.device("cuda", torch.cuda.current_device()),
        fingerprint="",
    )


def make_runner(loaded: LoadedModel, **settings: object) -> ModelRunner:
    """A runner over a pool of nothing but NaN."""
    layout = KVLayout(
        loaded.num_layers, BLOCK_SIZE, loaded.num_kv_heads, loaded.head_dim, loaded.dtype
    )
    pool = torch.full((256, layout.block_bytes), 0xFF, dtype=torch.uint8, device="cuda")
    return ModelRunner(
        loaded,
        layout,
        layout.view(pool),
        CudaStream(loaded.device),
        **settings,  # type: ignore[arg-type]
    )


def generate(
    runner: ModelRunner, prompts: list[list[int]], count: int, params: SamplingParams
) -> tuple[list[list[int]], list[list[torch.Tensor]]]:
    """Generates in chunks of random length beside each other; returns tokens and logits."""
    rng = random.Random(5)
    free = list(range(256))
    rng.shuffle(free)
    logs = [list(prompt) for prompt in prompts]
    tables = [
        array("i", [free.pop() for _ in range(-(-(len(log) + count) // BLOCK_SIZE))])
        for log in logs
    ]
    computed = [0] * len(logs)
    logits: list[list[torch.Tensor]] = [[] for _ in prompts]
    while any(len(log) < len(prompt) + count for log, prompt in zip(logs, prompts, strict=True)):
        parts = []
        for i, log in enumerate(logs):
            if len(log) >= len(prompts[i]) + count:
                continue
            end = min(len(log), computed[i] + rng.choice([1, 5, 40, 200]))
            wanted = SampleRequest(params, end, return_logits=True) if end == len(log) else None
            parts.append((i, SequenceSlice(log[computed[i] : end], computed[i], tables[i], wanted)))
        parts.sort(key=lambda item: len(item[1].token_ids) > 1)
        result = runner.launch(StepPlan(tuple(part for _, part in parts))).result()
        for (i, part), sample in zip(parts, result.samples, strict=True):
            computed[i] += len(part.token_ids)
            if sample is not None:
                assert sample.logits is not None
                logits[i].append(torch.frombuffer(bytearray(sample.logits), dtype=torch.float32))
                logs[i].append(sample.token_id)
    return [log[len(p) :] for log, p in zip(logs, prompts, strict=True)], logits


PROMPTS = [[(11 * i + 7 * n) % 640 for i in range(n)] for n in (300, 33, 150, 2, 77, 1)]
GREEDY = SamplingParams()


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
    ahead = [runner.launch(plan) for plan in plans]
    assert [dataclasses.astuple(step.result()) for step in ahead] == [
        dataclasses.astuple(result) for result in alone
    ]
