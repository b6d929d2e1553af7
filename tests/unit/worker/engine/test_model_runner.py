"""The model runner on a tiny model: what it gives does not depend on how the work was cut."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from services.common.errors import ConfigError
from services.worker.engine.kv_layout import KVLayout
from services.worker.engine.model_loader import LoadedModel
from services.worker.engine.model_runner import ModelRunner
from services.worker.engine.step import SampleRequest, SequenceSlice, StepPlan
from services.worker.messages import SamplingParams
from tests.support.model_driver import Driver, driving, load_quietly, transformers_greedy

PROMPTS = [list(range(n, 3 * n + 1)) for n in (40, 7, 23, 1)]


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_quietly("dummy:tiny")


@pytest.fixture
def driver(loaded: LoadedModel) -> Iterator[Driver]:
    with driving(loaded) as driver:
        yield driver


def test_a_mixed_batch_in_chunks_equals_generate(driver: Driver) -> None:
    texts = [driver.text(prompt, 24) for prompt in PROMPTS]
    expected = [transformers_greedy(driver.loaded, prompt, 24) for prompt in PROMPTS]
    assert driver.generate(texts, 24) == expected


def test_warm_up_leaves_a_pool_that_serves(driver: Driver) -> None:
    driver.runner.warm_up()
    text = driver.text(PROMPTS[0], 8)
    assert driver.generate([text], 8) == [transformers_greedy(driver.loaded, PROMPTS[0], 8)]


@pytest.mark.parametrize("num_blocks", [1, 2, 5])
def test_warm_up_needs_no_more_than_one_block(loaded: LoadedModel, num_blocks: int) -> None:
    with driving(loaded, num_blocks=num_blocks, block_size_tokens=4) as driver:
        driver.runner.warm_up()


def test_seeded_sampling_is_the_same_alone_and_in_a_batch(loaded: LoadedModel) -> None:
    sampling = SamplingParams(temperature=0.9, top_k=50, top_p=0.95, seed=7)
    with driving(loaded) as driver:
        alone = driver.generate([driver.text(PROMPTS[2], 20, sampling)], 20)
    with driving(loaded, seed=1) as driver:
        texts = [driver.text(prompt, 20) for prompt in PROMPTS]
        texts.append(driver.text(PROMPTS[2], 20, sampling))
        together = driver.generate(texts, 20)
    assert together[-1:] == alone
    assert together[-1] != together[2]


@pytest.mark.parametrize(
    "sampling", [SamplingParams(), SamplingParams(temperature=0.9, top_k=50, seed=7)]
)
def test_steps_that_follow_each_other_give_what_they_give_one_by_one(
    loaded: LoadedModel, sampling: SamplingParams
) -> None:
    with driving(loaded) as driver:
        expected = [driver.generate([driver.text(p, 5, sampling)], 5)[0] for p in PROMPTS]
    with driving(loaded) as driver:
        texts = [driver.text(prompt, 5, sampling) for prompt in PROMPTS]
        # Prompts that end in this step change places with those that ended before.
        order = sorted(texts, key=lambda text: len(text.tokens) > 1)
        launched = [driver.runner.launch(StepPlan(tuple(map(driver.part, order))))]
        for ahead in range(4):
            order, before = order[::-1], order
            parts = [
                SequenceSlice(
                    token_ids=[0],
                    start=len(text.tokens) + ahead,
                    block_table=text.block_table,
                    sample=SampleRequest(sampling, len(text.tokens) + ahead + 1),
                    follows=before.index(text),
                )
                for text in order
            ]
            launched.append(driver.runner.launch(StepPlan(tuple(parts))))
            for text, sample in zip(before, launched[-2].result().samples, strict=True):
                assert sample is not None
                text.chosen.append(sample.token_id)
        for text, sample in zip(order, launched[-1].result().samples, strict=True):
            assert sample is not None
            text.chosen.append(sample.token_id)
        assert [text.chosen for text in texts] == expected


def test_a_step_may_follow_logits_that_are_not_numbers(driver: Driver) -> None:
    bad = driver.text(PROMPTS[1], 2)
    good = driver.text(PROMPTS[0], 2)
    first = driver.runner.launch(StepPlan((driver.part(bad), driver.part(good))))
    block = driver.layout.view(driver.pool)[bad.block_table[0]]

    def spoil() -> None:
        block.fill_(torch.nan)

    driver.stream.launch(spoil)
    parts = [
        SequenceSlice(
            [0],
            len(text.tokens),
            text.block_table,
            SampleRequest(text.sampling, len(text.tokens) + 1),
            follows=index,
        )
        for index, text in enumerate((bad, good))
    ]
    second = driver.runner.launch(StepPlan(tuple(parts)))
    third = driver.runner.launch(
        StepPlan(tuple(dataclasses.replace(part, start=part.start + 1) for part in parts))
    )
    assert first.result().samples[1] is not None
    assert second.result().failed == third.result().failed == {0}


def test_steps_say_how_long_they_took_and_how_long_the_device_waited(driver: Driver) -> None:
    text = driver.text(PROMPTS[1], 1)
    plan = StepPlan((driver.part(text),))
    first = driver.runner.launch(plan).result()
    begin_s = time.monotonic()
    second = driver.runner.launch(plan).result()
    assert first.busy_s > 0
    assert 0 < second.busy_s < time.monotonic() - begin_s
    assert second.gap_s > 0


def test_a_slice_within_the_prompt_samples_nothing(driver: Driver) -> None:
    text, other = driver.text(PROMPTS[0], 1), driver.text(PROMPTS[1], 1)
    result = driver.step(driver.part(text, 10), driver.part(other))
    assert result.samples[0] is None
    assert result.samples[1] is not None
    text.computed = 10
    assert driver.step(driver.part(text, 5)).samples == (None,)


def test_logits_and_logprobs_come_only_where_asked(driver: Driver) -> None:
    texts = [driver.text(prompt, 1) for prompt in PROMPTS[:3]]
    result = driver.step(
        driver.part(texts[0], logprobs=3, return_logits=True),
        driver.part(texts[1]),
        driver.part(texts[2], logprobs=0),
    )
    first, second, third = result.samples
    assert first is not None
    assert second is not None
    assert third is not None
    assert second.logprobs is None
    assert second.logits is None
    assert first.logits is not None
    logits = torch.frombuffer(bytearray(first.logits), dtype=torch.float32)
    assert logits.shape == (driver.loaded.vocab_size,)
    expected = logits.log_softmax(-1)
    assert first.token_id == logits.argmax()
    assert first.logprobs is not None
    assert first.logprobs.chosen.token_id == first.token_id
    assert first.logprobs.chosen.logprob == pytest.approx(float(expected[first.token_id]))
    assert [t.token_id for t in first.logprobs.top] == expected.topk(3).indices.tolist()
    assert third.logprobs is not None
    assert third.logprobs.top == []
    assert third.logprobs.chosen.token_id == third.token_id
    assert third.logits is None


def test_logprobs_are_of_the_raw_logits_whatever_the_temperature(driver: Driver) -> None:
    hot = SamplingParams(temperature=3.0, top_k=5, seed=1)
    text = driver.text(PROMPTS[1], 1, hot)
    (sample,) = driver.step(driver.part(text, logprobs=1, return_logits=True)).samples
    assert sample is not None
    assert sample.logits is not None
    assert sample.logprobs is not None
    expected = torch.frombuffer(bytearray(sample.logits), dtype=torch.float32).log_softmax(-1)
    assert sample.logprobs.chosen.logprob == pytest.approx(float(expected[sample.token_id]))


def test_logits_that_are_not_numbers_fail_their_slice_and_no_other(driver: Driver) -> None:
    kv = driver.layout.view(driver.pool)
    good, bad = driver.text(PROMPTS[0], 2), driver.text(PROMPTS[1], 2)
    driver.advance([good, bad], [None, None])
    kv[bad.block_table[0]] = torch.nan
    result = driver.step(driver.part(good), driver.part(bad))
    assert result.failed == {1}
    assert result.samples[1] is None
    assert result.samples[0] is not None
    driver.advance([good], [None])
    assert good.chosen == transformers_greedy(driver.loaded, PROMPTS[0], 2)


def test_launch_waits_for_nothing(driver: Driver) -> None:
    gate = threading.Event()

    def wait() -> None:
        assert gate.wait(30)

    driver.stream.launch(wait)
    text = driver.text(PROMPTS[1], 1)
    step = driver.runner.launch(StepPlan((driver.part(text),)))
    assert not step.done()
    gate.set()
    assert step.result().samples[0] is not None
    assert step.done()


def test_a_failed_step_says_so_through_its_event(driver: Driver) -> None:
    beyond = len(driver.pool)
    part = SequenceSlice([1], 0, [beyond], SampleRequest(SamplingParams(), 1))
    step = driver.runner.launch(StepPlan((part,)))
    with pytest.raises(IndexError):
        step.result()
    with pytest.raises(IndexError):
        step.done()


def test_an_unknown_backend_is_refused(loaded: LoadedModel) -> None:
    layout = KVLayout(4, 8, 2, 32, torch.float32)
    pool = torch.zeros(1, layout.block_bytes, dtype=torch.uint8)
    with pytest.raises(ConfigError, match="--attention nonsense"):
        ModelRunner(loaded, layout, layout.view(pool), None, attention="nonsense")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs(dtype: str) -> None:
    with driving(load_quietly("dummy:tiny", dtype=dtype)) as driver:
        driver.runner.warm_up()
        (chosen,) = driver.generate([driver.text(PROMPTS[0], 4)], 4)
        assert all(0 <= token < driver.loaded.vocab_size for token in chosen)
