"""The engine on real CUDA streams, evicted between requests, against transformers' `generate`."""

from __future__ import annotations

import random

import pytest
import torch

from services.worker.config import EngineConfig
from services.worker.engine.model_loader import load
from services.worker.engine.process import Built, build
from services.worker.engine.streams import Wakeup
from services.worker.messages import (
    Command,
    CommandDone,
    Evict,
    EvictMode,
    Finished,
    Rejected,
    SamplingParams,
    Submit,
    Tokens,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

NEW_TOKENS = 32


def build_on_gpu(**fields: object) -> Built:
    config = EngineConfig(model="dummy:tiny", device="cuda", dtype="float32", **fields)  # type: ignore[arg-type]
    return build(config, Wakeup(), lambda _what, _done: None)


def submit(name: str, request: str, append: list[int], count: int) -> Submit:
    return Submit(
        request_id=request,
        session_id=name,
        create=True,
        cache_salt="",
        priority=0,
        scheduler_record=b"",
        full_context=None,
        expected_context_length=None,
        append=append,
        sampling=SamplingParams(),
        max_tokens=count,
        stop_token_ids=[],
        logprobs=None,
        return_logits=False,
        received_ns=0,
    )


def test_tokens_equal_those_of_generate_whatever_is_evicted() -> None:
    built = build_on_gpu(device_pool_gib=0.01, host_pool_gib=0.1)
    rng = random.Random(3)
    prompts = {
        str(index): [rng.randrange(built.ready.vocab_size) for _ in range(64)]
        for index in range(16)
    }
    tokens: dict[str, list[int]] = {name: [] for name in prompts}
    engine = built.engine
    for name, prompt in prompts.items():
        engine.handle(submit(name, f"{name}/0", prompt, rng.randrange(4, 12)))
    while any(len(made) < NEW_TOKENS for made in tokens.values()):
        engine.turn()
        heard, engine.outbox = engine.outbox, []
        for message in heard:
            assert not isinstance(message, Rejected), message
            if isinstance(message, Tokens):
                tokens[message.request_id.split("/")[0]] += message.token_ids
            elif isinstance(message, Finished):
                name = message.request_id.split("/")[0]
                evict = Command(f"evict {message.request_id}", name, Evict(EvictMode.SCRUB))
                engine.handle(evict)
            elif isinstance(message, CommandDone):
                assert message.error is None, message
                name = message.session_id
                left = NEW_TOKENS - len(tokens[name])
                if left:
                    count = min(left, rng.randrange(4, 12))
                    engine.handle(submit(name, f"{name}/{len(tokens[name])}", [], count))
    engine.check_integrity()
    for stream in built.streams:
        stream.close()
    built.host.close()
    assert engine.report().counters.loads > len(prompts)

    model = load(EngineConfig(model="dummy:tiny", device="cuda", dtype="float32"), _quiet).model
    model.set_attn_implementation("sdpa")
    model.generation_config.eos_token_id = None
    batch = torch.tensor(list(prompts.values()), device="cuda")
    out = model.generate(
        batch,
        attention_mask=torch.ones_like(batch),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
    )
    assert list(tokens.values()) == out[:, batch.shape[1] :].tolist()


def _quiet(_what: str, _done: float) -> None:
    return
