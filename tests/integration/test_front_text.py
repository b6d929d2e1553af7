"""Text in and out of a front, with a fake engine that echoes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from djinn.v1 import inference_service_pb2 as pb
from tests.support.front import CONFIG, ENGINE, Running, serving, text_of, tokens_of
from tests.support.text_model import byte_tokenizer, write_text_model


@pytest.fixture
async def text_worker(tmp_path: Path) -> AsyncIterator[Running]:
    folder = write_text_model(tmp_path / "model", bos=True)
    config = replace(CONFIG, engine=replace(ENGINE, model=str(folder)))
    async with serving(config) as running:
        yield running


async def test_text_is_tokenized_and_detokenized(text_worker: Running) -> None:
    prompt = "héllo €"
    size = len(prompt.encode())
    responses = await text_worker.generate(append_text=prompt, max_tokens=size + 1)
    # The echo begins with the begin-of-sequence token, which gives no text.
    assert len(responses[0].started.appended_token_ids) == size + 1
    assert text_of(responses) == prompt
    again = await text_worker.generate(append_text=prompt, max_tokens=size)
    assert len(again[0].started.appended_token_ids) == size
    assert text_of(again) == prompt


async def test_a_stop_string_cuts_text_and_context(text_worker: Running) -> None:
    responses = await text_worker.generate(
        append_text="one STOP two", max_tokens=100, stop_strings=["STOP", "never"]
    )
    assert text_of(responses) == "one "
    finished = responses[-1].finished
    assert finished.reason == pb.FINISH_REASON_STOP
    assert finished.stop_string == "STOP"
    # Begin-of-sequence token and "one STOP".
    assert tokens_of(responses) == list(responses[0].started.appended_token_ids[:9])
    assert finished.context_length == 13 + 9
    assert finished.usage.completion_tokens == 9


async def test_a_chat_continues_turn_by_turn(text_worker: Running) -> None:
    turns = pb.ChatTurns(turns=[pb.ChatTurn(role="user", content="hi")])
    first = await text_worker.generate(append_chat=turns, max_tokens=3)
    second = await text_worker.generate(append_chat=turns, max_tokens=1000 - 200)
    tokenizer = byte_tokenizer()
    texts = [
        tokenizer.decode(list(r[0].started.appended_token_ids), skip_special_tokens=False)
        for r in (first, second)
    ]
    assert texts[0] == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    # The first answer was cut off by max_tokens, so its turn is closed first.
    assert texts[1] == "<|im_end|>\n" + texts[0]
    # The echo of the second contains the end-of-turn token, which ends the generation.
    assert second[-1].finished.reason == pb.FINISH_REASON_STOP
    third = await text_worker.generate(append_chat=turns, max_tokens=1)
    text = tokenizer.decode(list(third[0].started.appended_token_ids), skip_special_tokens=False)
    assert text == "\n" + texts[0]
