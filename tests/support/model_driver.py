"""Drives a model runner by hand: blocks in scrambled order, prompts in chunks, decodes in a batch.

The pool starts full of NaN, so that a slot read before it was written shows in every token.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from services.worker.config import EngineConfig
from services.worker.engine.kv_layout import KVLayout
from services.worker.engine.model_loader import LoadedModel, load
from services.worker.engine.model_runner import ModelRunner
from services.worker.engine.models.any import ATTENTION_NAME
from services.worker.engine.step import SampleRequest, SequenceSlice, StepPlan, StepResult
from services.worker.engine.streams import CpuStream, Wakeup
from services.worker.messages import SamplingParams

GREEDY = SamplingParams()


def load_quietly(model: str, **settings: object) -> LoadedModel:
    """Loads a model on the CPU, telling nobody of its progress."""
    return load(EngineConfig(model=model, **settings), lambda _what, _fraction: None)  # type: ignore[arg-type]


def nan_pool(layout: KVLayout, num_blocks: int) -> torch.Tensor:
    """Returns a pool of nothing but NaN."""
    return torch.full((num_blocks, layout.block_bytes), 0xFF, dtype=torch.uint8)


@dataclass
class Text:
    """One sequence."""

    tokens: list[int]
    block_table: list[int]
    computed: int = 0
    sampling: SamplingParams = GREEDY
    chosen: list[int] = field(default_factory=list)


class Driver:
    """A runner over a pool of its own."""

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        num_blocks: int = 64,
        block_size_tokens: int = 8,
        seed: int = 0,
    ) -> None:
        self.loaded = loaded
        self.layout = KVLayout(
            loaded.num_layers,
            block_size_tokens,
            loaded.num_kv_heads,
            loaded.head_dim,
            loaded.dtype,
        )
        self.pool = nan_pool(self.layout, num_blocks)
        self.stream = CpuStream("compute", Wakeup())
        self.runner = ModelRunner(loaded, self.layout, self.layout.view(self.pool), self.stream)
        self._random = random.Random(seed)
        self.free = list(range(num_blocks))
        self._random.shuffle(self.free)

    def text(self, tokens: Sequence[int], room: int, sampling: SamplingParams = GREEDY) -> Text:
        """Returns a sequence with blocks for its tokens and `room` more."""
        count = -(-(len(tokens) + room) // self.layout.block_size_tokens)
        return Text(list(tokens), [self.free.pop() for _ in range(count)], sampling=sampling)

    def part(self, text: Text, count: int | None = None, **wants: object) -> SequenceSlice:
        """Returns a slice of a sequence's next tokens; sampled after if it reaches the end."""
        end = len(text.tokens) if count is None else min(text.computed + count, len(text.tokens))
        sample = None
        if end == len(text.tokens):
            sample = SampleRequest(text.sampling, position=end, **wants)  # type: ignore[arg-type]
        return SequenceSlice(
            text.tokens[text.computed : end], text.computed, text.block_table, sample
        )

    def step(self, *parts: SequenceSlice) -> StepResult:
        """Runs one step."""
        return self.runner.launch(StepPlan(parts)).result()

    def advance(self, texts: Sequence[Text], counts: Sequence[int | None]) -> None:
        """Computes the next tokens of several sequences in one step and appends what is chosen."""
        parts = [self.part(text, count) for text, count in zip(texts, counts, strict=True)]
        order = sorted(range(len(parts)), key=lambda i: len(parts[i].token_ids) > 1)
        result = self.step(*(parts[i] for i in order))
        for i, sample in zip(order, result.samples, strict=True):
            texts[i].computed += len(parts[i].token_ids)
            if sample is not None:
                texts[i].tokens.append(sample.token_id)
                texts[i].chosen.append(sample.token_id)

    def generate(self, texts: Sequence[Text], count: int) -> list[list[int]]:
        """Generates `count` tokens of each: chunks of random length beside others' decodes."""
        while any(len(text.chosen) < count for text in texts):
            active = [text for text in texts if len(text.chosen) < count]
            self.advance(active, [self._random.choice([1, 3, 7, 20, None]) for _ in active])
        return [text.chosen for text in texts]

    def close(self) -> None:
        """Ends the compute stream."""
        self.stream.close()


@contextmanager
def driving(loaded: LoadedModel, **settings: int) -> Iterator[Driver]:
    """A driver for the length of a block."""
    driver = Driver(loaded, **settings)
    try:
        yield driver
    finally:
        driver.close()


def transformers_greedy(loaded: LoadedModel, prompt: Sequence[int], count: int) -> list[int]:
    """Returns what transformers' own `generate` makes of a prompt, with its own attention."""
    model = loaded.model
    model.set_attn_implementation("sdpa")
    try:
        made = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
    finally:
        model.set_attn_implementation(ATTENTION_NAME)
    tokens: list[int] = made[0, len(prompt) :].tolist()
    return tokens
