"""SmolLM2 through the engine, evicted at random, against transformers' own `generate`."""

from __future__ import annotations

import random
import select
from collections.abc import Iterator

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

NEW_TOKENS = 64
# Eight prompts of each length, so that `generate` needs no padding.
LENGTHS = (9, 33, 64, 120)
CONFIG = EngineConfig(
    model="smollm2",
    dtype="float32",
    # About a third of what the prompts and their continuations fill.
    device_pool_gib=120 * 16 * 46_080 / 2**30,
    host_pool_gib=1.0,
    max_step_tokens=192,
    max_context_length=512,
)
TEXT = """An agent reasons about what it was asked, calls a tool, waits, and reflects on what came
back. While it waits, its memory of the conversation lies idle. The little lighthouse keeper wrote
every ship's name into a book, and at night she read them aloud to the sea. Mix flour, salt, water
and a spoon of honey; let the dough rest until it has doubled, then bake it hot. In 1969 two people
walked on the moon while a third went round it alone, further from everyone than anybody before."""


@pytest.fixture
def wakeup() -> Iterator[Wakeup]:
    wakeup = Wakeup()
    yield wakeup
    wakeup.close()


def prompts_of(token_ids: list[int]) -> list[list[int]]:
    """Returns eight different prompts of each length, cut from a text."""
    rng = random.Random(7)
    found = []
    for length in LENGTHS:
        for _ in range(8):
            start = rng.randrange(len(token_ids))
            found.append([token_ids[(start + i) % len(token_ids)] for i in range(length)])
    return found


def generated_by_transformers(prompts: list[list[int]]) -> list[list[int]]:
    model = load(CONFIG, lambda _what, _done: None).model
    model.set_attn_implementation("sdpa")
    model.generation_config.eos_token_id = None
    outputs = []
    for first in range(0, len(prompts), 8):
        batch = torch.tensor(prompts[first : first + 8])
        out = model.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
        )
        outputs += out[:, batch.shape[1] :].tolist()
    return outputs


class Driver:
    """Runs every prompt in pieces, with an eviction that leaves nothing on the device between."""

    def __init__(self, built: Built, wakeup: Wakeup, prompts: list[list[int]]) -> None:
        self._built = built
        self._wakeup = wakeup
        self._rng = random.Random(11)
        self.tokens: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
        for name, prompt in enumerate(prompts):
            self._submit(str(name), prompt)

    def run(self) -> None:
        engine = self._built.engine
        while any(len(tokens) < NEW_TOKENS for tokens in self.tokens.values()):
            self._wakeup.clear()
            engine.turn()
            heard, engine.outbox = engine.outbox, []
            for message in heard:
                self._hear(message)
            if not engine.outbox:
                select.select([self._wakeup.fileno()], [], [], 1.0)
        engine.check_integrity()

    def _hear(self, message: object) -> None:
        if isinstance(message, Tokens):
            self.tokens[message.request_id.split("/")[0]] += message.token_ids
        elif isinstance(message, Finished):
            name = message.request_id.split("/")[0]
            self._built.engine.handle(
                Command(f"evict {message.request_id}", name, Evict(EvictMode.SCRUB))
            )
        elif isinstance(message, CommandDone):
            assert message.error is None, message
            if len(self.tokens[message.session_id]) < NEW_TOKENS:
                self._submit(message.session_id, [])
        else:
            assert not isinstance(message, Rejected), message

    def _submit(self, name: str, append: list[int]) -> None:
        done = len(self.tokens[name])
        self._built.engine.handle(
            Submit(
                request_id=f"{name}/{done}",
                session_id=name,
                create=True,
                cache_salt="",
                priority=0,
                scheduler_record=b"",
                full_context=None,
                expected_context_length=None,
                append=append,
                sampling=SamplingParams(),
                max_tokens=min(self._rng.randrange(8, 40), NEW_TOKENS - done),
                stop_token_ids=[],
                logprobs=None,
                return_logits=False,
                received_ns=0,
            )
        )


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_tokens_equal_those_of_generate_whatever_is_evicted(wakeup: Wakeup) -> None:
    from transformers import AutoTokenizer

    from services.common.model_files import tokenizer_source

    built = build(CONFIG, wakeup, lambda _what, _done: None)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_source("smollm2"))
    prompts = prompts_of(tokenizer(TEXT, add_special_tokens=False)["input_ids"])
    driver = Driver(built, wakeup, prompts)
    driver.run()
    counters = built.engine.report().counters
    for stream in built.streams:
        stream.close()
    assert len(prompts) == 32
    assert counters.evictions >= 32
    assert counters.loads >= 32
    assert counters.preemptions + counters.evictions > 64
    assert list(driver.tokens.values()) == generated_by_transformers(prompts)
