"""Small models of real families on a GPU, and what drives a runner over them."""

from __future__ import annotations

import random
from array import array

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
