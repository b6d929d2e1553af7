from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from services.common.errors import (
    DrainingError,
    InvalidRequestError,
    UnavailableError,
    UnsupportedError,
)
from services.worker import messages
from services.worker.front import generator as module
from services.worker.front import tokenizer
from services.worker.front.chat import ChatTemplate, Turn
from services.worker.front.generation import Generation
from services.worker.front.generator import GenerateInput, Generator
from services.worker.front.session_log import SessionLogs
from tests.support.stand_ins import MODEL
from tests.support.text_model import write_text_model

INPUT = GenerateInput(
    session_id="s",
    create=True,
    cache_salt="salt",
    priority=3,
    scheduler_record=b"r",
    request_id="mine",
    full_context=None,
    expected_context_length=None,
    append=[10, 11],
    sampling=messages.SamplingParams(seed=4),
    max_tokens=5,
    stop_strings=(),
    stop_token_ids=(7,),
    ignore_eos=False,
    logprobs=None,
    return_logits=False,
)


class StandInEngine:
    """Takes requests and runs none."""

    def __init__(self) -> None:
        self.alive = True
        self.sent: list[messages.ToEngine] = []

    def send(self, message: messages.ToEngine) -> None:
        self.sent.append(message)

    def submit(self, generation: Generation) -> None:
        self.sent.append(generation.submit)


class Bench:
    def __init__(self, folder: Path | None = None) -> None:
        self.engine = StandInEngine()
        self.logs = SessionLogs()
        model = MODEL
        if folder is not None:
            text = tokenizer.load(write_text_model(folder, bos=True))
            ready = replace_ready(vocab_size=300, max_context_length=50_000)
            model = replace(MODEL, text=text, chat=ChatTemplate(text), ready=ready)
        self.model = model
        self.generator = Generator(self.engine, self.logs, model)  # type: ignore[arg-type]

    async def submit(self, **fields: object) -> messages.Submit:
        given = replace(INPUT, **fields)  # type: ignore[arg-type]
        generation = await self.generator.start(given, 99)
        return generation.submit

    def remember(self, *tokens: int) -> None:
        self.logs.ensure("s").begin(len(tokens), tokens[-1])


def replace_ready(**fields: object) -> messages.Ready:
    names = messages.Ready.__struct_fields__
    return messages.Ready(**{name: getattr(MODEL.ready, name) for name in names} | fields)


async def test_a_request_reaches_the_engine_as_asked() -> None:
    bench = Bench()
    submit = await bench.submit()
    assert bench.engine.sent == [submit]
    assert (submit.session_id, submit.create, submit.cache_salt) == ("s", True, "salt")
    assert (submit.priority, submit.scheduler_record, submit.received_ns) == (3, b"r", 99)
    assert (submit.append, submit.max_tokens, submit.sampling.seed) == ([10, 11], 5, 4)
    assert submit.stop_token_ids == [2, 7]
    assert "mine" in submit.request_id


async def test_requests_of_one_name_are_told_apart() -> None:
    bench = Bench()
    assert (await bench.submit()).request_id != (await bench.submit()).request_id


async def test_the_models_own_stop_tokens_can_be_ignored() -> None:
    assert (await Bench().submit(ignore_eos=True)).stop_token_ids == [7]


async def test_an_expectation_beside_a_full_context_is_dropped() -> None:
    submit = await Bench().submit(full_context=[1, 2], expected_context_length=9)
    assert (submit.full_context, submit.expected_context_length) == ([1, 2], None)


@pytest.mark.parametrize(
    "fields", [{"append": None}, {"append": []}, {"append": [], "full_context": []}]
)
async def test_a_prompt_without_any_token_is_refused(fields: dict[str, object]) -> None:
    bench = Bench()
    with pytest.raises(InvalidRequestError, match="empty prompt"):
        await bench.submit(**fields)
    assert bench.engine.sent == []


async def test_nothing_may_be_appended_to_a_context() -> None:
    bench = Bench()
    bench.remember(1, 2)
    assert (await bench.submit(append=None)).append == []
    assert (await bench.submit(append=[], full_context=[5])).append == []


async def test_an_unknown_session_is_left_to_the_engine() -> None:
    assert (await Bench().submit(create=False, append=None)).append == []


async def test_a_draining_worker_takes_nothing() -> None:
    bench = Bench()
    bench.generator.drain()
    assert bench.generator.draining
    with pytest.raises(DrainingError):
        await bench.submit()


async def test_without_an_engine_nothing_is_taken() -> None:
    bench = Bench()
    bench.engine.alive = False
    with pytest.raises(UnavailableError):
        await bench.submit()


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"append": "text"}, "append_text"),
        ({"append": (Turn("user", "hi"),)}, "append_chat"),
        ({"stop_strings": ("x",)}, "stop_strings"),
    ],
)
async def test_without_a_tokenizer_text_is_refused_by_name(
    fields: dict[str, object], word: str
) -> None:
    with pytest.raises(UnsupportedError, match=f"{word}.*dummy:test"):
        await Bench().submit(**fields)


async def test_only_the_first_text_of_a_session_begins_with_the_begin_token(
    tmp_path: Path,
) -> None:
    bench = Bench(tmp_path)
    assert bench.model.text is not None
    plain = bench.model.text.encode("hi", first=False)
    first = bench.model.text.encode("hi", first=True)
    assert first != plain
    assert (await bench.submit(append="hi")).append == first
    assert (await bench.submit(append="hi", full_context=[])).append == first
    assert (await bench.submit(append="hi", full_context=[1])).append == plain
    bench.remember(1, 2)
    assert (await bench.submit(append="hi")).append == plain


async def test_a_worker_that_lost_a_session_goes_by_what_its_client_expects(
    tmp_path: Path,
) -> None:
    bench = Bench(tmp_path)
    assert bench.model.text is not None
    plain = bench.model.text.encode("hi", first=False)
    assert (await bench.submit(append="hi", expected_context_length=9)).append == plain


async def test_a_chat_turn_closes_the_one_before_only_if_it_is_open(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    assert bench.model.text is not None
    turns = (Turn("user", "hi"),)
    end = bench.model.text.tokenizer.token_to_id("<|im_end|>")
    assert end is not None
    bench.remember(1, 5)
    still_open = (await bench.submit(append=turns)).append
    bench.remember(1, end)
    assert still_open == [end, *(await bench.submit(append=turns)).append]
    assert (await bench.submit(append=turns, full_context=[5])).append == still_open


async def test_a_model_whose_turns_cannot_be_continued_refuses_them(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    without = replace(bench.model, chat=None)
    bench.generator.model = without
    with pytest.raises(UnsupportedError, match="append_chat"):
        await bench.submit(append=(Turn("user", "hi"),))


@pytest.mark.parametrize("chat", [False, True])
async def test_a_long_text_is_tokenized_like_a_short_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chat: bool
) -> None:
    bench = Bench(tmp_path)
    append = (Turn("user", "word " * 50),) if chat else "word " * 50
    short = (await bench.submit(append=append)).append
    monkeypatch.setattr(module, "LONG_TEXT_CHARS", 10)
    assert (await bench.submit(append=append, session_id="t")).append == short
