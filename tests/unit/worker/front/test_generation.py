from __future__ import annotations

import asyncio

import pytest

from services.common.errors import (
    CancelledError,
    EngineLostError,
    ExhaustedError,
    SessionClosedError,
)
from services.worker import messages
from services.worker.front import generation as module
from services.worker.front.detokenize import Detokenizer
from services.worker.front.generation import Begun, Delta, End, Generation
from services.worker.front.session_log import SessionLog
from services.worker.front.stop_strings import StopStrings
from services.worker.front.text_stream import TextStream
from tests.support.stand_ins import finished, started, submit, tokens
from tests.support.text_model import byte_tokenizer

TOKENIZER = byte_tokenizer()


class Bench:
    """A generation, and what it sends to the engine."""

    def __init__(
        self, stops: tuple[str, ...] = (), *, text: bool = False, **fields: object
    ) -> None:
        self.sent: list[messages.ToEngine] = []
        self.log = SessionLog()
        watcher = StopStrings(stops) if stops else None
        stream = TextStream(Detokenizer(TOKENIZER) if text or stops else None, watcher)
        self.generation = Generation(submit(**fields), self.log, stream, self.sent.append)


def ids(text: str) -> list[int]:
    encoded: list[int] = TOKENIZER.encode(text).ids
    return encoded


async def test_the_way_of_the_first_token_is_timed() -> None:
    generation = Bench().generation
    generation.on_started(started())
    generation.on_tokens(messages.Tokens("1:r", [1], [], [], collected_ns=5))
    generation.on_tokens(messages.Tokens("1:r", [2], [], [], collected_ns=9))
    times = generation.times
    assert (times.collected_ns, times.first_sent_ns) == (5, 0)
    assert isinstance(await generation.next(), Begun)
    assert times.first_sent_ns == 0
    assert isinstance(await generation.next(), Delta)
    first_sent_ns = times.first_sent_ns
    assert first_sent_ns >= times.first_token_ns > 0
    generation.on_tokens(tokens(3))
    assert isinstance(await generation.next(), Delta)
    assert times.first_sent_ns == first_sent_ns


async def test_what_has_come_meanwhile_is_one_delta() -> None:
    bench = Bench()
    generation = bench.generation
    generation.on_started(started())
    for token in range(5):
        generation.on_tokens(tokens(token))
    generation.on_finished(finished(7))
    begun, delta, end = [await generation.next() for _ in range(3)]
    assert isinstance(begun, Begun)
    assert begun.appended == [10, 11]
    assert isinstance(delta, Delta)
    assert delta.token_ids == [0, 1, 2, 3, 4]
    assert isinstance(end, End)
    assert (end.prompt_tokens, end.completion_tokens, end.context_length) == (2, 5, 7)
    assert await generation.next() is None
    assert bench.log.last_token() == 4


async def test_a_client_that_waits_is_woken_by_each_step() -> None:
    generation = Bench().generation
    waiting = asyncio.ensure_future(generation.next())
    await asyncio.sleep(0)
    assert not waiting.done()
    generation.on_started(started())
    assert isinstance(await waiting, Begun)
    waiting = asyncio.ensure_future(generation.next())
    await asyncio.sleep(0)
    generation.on_tokens(tokens(1))
    delta = await waiting
    assert isinstance(delta, Delta)
    assert delta.token_ids == [1]


async def test_what_was_made_before_a_failure_is_delivered_first() -> None:
    generation = Bench().generation
    generation.on_started(started())
    generation.on_tokens(tokens(1))
    generation.fail(EngineLostError("gone"))
    assert isinstance(await generation.next(), Begun)
    assert isinstance(await generation.next(), Delta)
    with pytest.raises(EngineLostError):
        await generation.next()


async def test_a_rejection_is_raised() -> None:
    generation = Bench().generation
    generation.on_rejected(messages.Rejected("1:r", CancelledError("why").to_info()))
    with pytest.raises(CancelledError, match="why"):
        await generation.next()


async def test_a_closed_session_is_said_to_be_closed() -> None:
    generation = Bench().generation
    generation.on_rejected(messages.Rejected("1:r", SessionClosedError("shut").to_info()))
    with pytest.raises(SessionClosedError, match="shut"):
        await generation.next()


async def test_a_stop_string_ends_the_request_at_the_token_that_completes_it() -> None:
    bench = Bench(("##",))
    generation = bench.generation
    generation.on_started(started())
    generation.on_tokens(tokens(*ids("ab#")))
    generation.on_tokens(tokens(*ids("#cd")))
    generation.on_tokens(tokens(*ids("never seen")))
    assert bench.sent == [messages.StopAt("1:r", "s", 2 + 4)]
    generation.on_finished(finished(6, "stop"))
    await generation.next()
    delta, end = await generation.next(), await generation.next()
    assert isinstance(delta, Delta)
    assert isinstance(end, End)
    assert "".join(delta.text) == "ab"
    assert delta.token_ids == ids("ab##")
    assert (end.stop_string, end.context_length, end.completion_tokens) == ("##", 6, 4)
    assert bench.log.last_token() == ids("#")[0]


async def test_a_stop_string_counts_even_if_the_engine_ended_first() -> None:
    bench = Bench(("##",))
    generation = bench.generation
    generation.on_started(started())
    generation.on_tokens(tokens(*ids("a##b")))
    # Said before the engine had heard of the stop string.
    bench.log.cut(6)
    generation.on_finished(finished(6, "length"))
    await generation.next()
    await generation.next()
    end = await generation.next()
    assert isinstance(end, End)
    assert end.reason is messages.FinishReason.STOP
    assert end.context_length == 2 + 3


async def test_text_held_back_for_a_stop_string_is_given_at_the_end() -> None:
    generation = Bench(("##",)).generation
    generation.on_started(started())
    generation.on_tokens(tokens(*ids("a#")))
    generation.on_finished(finished(4))
    await generation.next()
    delta = await generation.next()
    assert isinstance(delta, Delta)
    assert "".join(delta.text) == "a#"


async def test_a_delta_may_be_text_alone() -> None:
    generation = Bench(text=True).generation
    generation.on_started(started())
    generation.on_tokens(tokens(ids("é")[0]))
    await generation.next()
    first = await generation.next()
    generation.on_finished(finished(3))
    last = await generation.next()
    assert isinstance(first, Delta)
    assert isinstance(last, Delta)
    assert (first.text, first.token_ids) == ([], ids("é")[:1])
    assert (last.text, last.token_ids) == (["�"], [])


async def test_cancelling_aborts_once_and_not_after_the_end() -> None:
    bench = Bench()
    bench.generation.cancel()
    assert bench.sent == [messages.Abort("1:r")]
    done = Bench()
    done.generation.on_started(started())
    done.generation.on_finished(finished(2))
    done.generation.cancel()
    assert done.sent == []


async def test_logits_that_nobody_takes_end_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PENDING_LOGITS_BYTES", 10)
    bench = Bench(return_logits=True)
    generation = bench.generation
    generation.on_started(started())
    generation.on_tokens(tokens(1, logits=[b"12345678"]))
    await generation.next()
    await generation.next()
    # Taken in time, so they no longer count.
    generation.on_tokens(tokens(2, logits=[b"12345678"]))
    assert bench.sent == []
    generation.on_tokens(tokens(3, logits=[b"12345678"]))
    assert bench.sent == [messages.Abort("1:r")]
    with pytest.raises(ExhaustedError, match="10 bytes"):
        await generation.next()


@pytest.mark.parametrize(
    ("fields", "last"),
    [
        ({"append": [1, 2]}, 2),
        ({"append": [], "full_context": [3, 4]}, 4),
        ({"append": []}, None),
    ],
)
async def test_the_log_knows_the_prompts_last_token(
    fields: dict[str, object], last: int | None
) -> None:
    bench = Bench(**fields)  # type: ignore[arg-type]
    bench.generation.on_started(started(5))
    assert (bench.log.length, bench.log.last_token()) == (5, last)
