from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from djinn.v1 import inference_service_pb2 as pb
from djinn_client import _fake_model
from djinn_client._transcript import DivergedError, TokenLog, Transcript
from djinn_client._types import FinishReason, Piece

PROMPT = [1, 2, 3]


def _template(
    append: Sequence[int] = (7,),
    max_tokens: int | None = None,
    stop_strings: Sequence[str] = (),
    stop_token_ids: Sequence[int] = (),
    *,
    ignore_eos: bool = False,
) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        session_id="s",
        append_token_ids=pb.TokenIds(ids=append),
        max_tokens=max_tokens,
        stop_strings=stop_strings,
        stop_token_ids=stop_token_ids,
        ignore_eos=ignore_eos,
    )


def _delta(*ids: int, text: str = "") -> pb.GenerateDelta:
    return pb.GenerateDelta(token_ids=ids, text=text)


def _started(*appended: int) -> pb.GenerateStarted:
    return pb.GenerateStarted(appended_token_ids=appended)


@dataclass
class Worker:
    """Answers requests as a worker does whose model says `reply` after every prompt."""

    reply: str
    prompt_length: int
    group: int = 1

    def answer(self, request: pb.GenerateRequest) -> Iterator[pb.GenerateResponse]:
        log = [*request.full_context.ids, *request.append_token_ids.ids]
        yield pb.GenerateResponse(started=_started(*request.append_token_ids.ids))
        all_ids = [*_fake_model.encode(self.reply), _fake_model.EOS]
        ids = all_ids[len(log) - self.prompt_length :]
        if request.HasField("max_tokens"):
            ids = ids[: request.max_tokens]
        text = _fake_model.TextStream(request.stop_strings)
        reason = pb.FINISH_REASON_LENGTH
        for place in range(0, len(ids), self.group):
            delta = pb.GenerateDelta()
            for token in ids[place : place + self.group]:
                delta.token_ids.append(token)
                log.append(token)
                delta.text += text.push(token)
                if text.stop_string or token == _fake_model.EOS:
                    reason = pb.FINISH_REASON_STOP
                    break
            is_last = reason == pb.FINISH_REASON_STOP or place + self.group >= len(ids)
            if is_last and not text.stop_string:
                delta.text += text.flush()
            yield pb.GenerateResponse(delta=delta)
            if is_last:
                break
        yield pb.GenerateResponse(
            finished=pb.GenerateFinished(
                reason=reason, context_length=len(log), stop_string=text.stop_string
            )
        )


def _take(transcript: Transcript, message: pb.GenerateResponse) -> Piece | None:
    kind = message.WhichOneof("event")
    if kind == "started":
        transcript.on_started(message.started)
    elif kind == "delta":
        return transcript.on_delta(message.delta)
    else:
        transcript.on_finished(message.finished)
    return None


def _generate(
    worker: Worker, template: pb.GenerateRequest, cuts: Sequence[int]
) -> tuple[Transcript, TokenLog, list[Piece], int]:
    """Runs a generation that is cut after so many messages of each attempt."""
    log = TokenLog(PROMPT, is_shared=False)
    transcript = Transcript(template, None, log)
    pieces: list[Piece] = []
    attempts = 0
    for cut in [*cuts, None]:
        attempts += 1
        for count, message in enumerate(worker.answer(transcript.next_request())):
            if count == cut:
                break
            piece = _take(transcript, message)
            if piece is not None:
                pieces.append(piece)
        if transcript.finish_reason is None:
            transcript.end_if_complete({_fake_model.EOS})
        if transcript.finish_reason is not None:
            break
    return transcript, log, pieces, attempts


texts = st.text(st.sampled_from("ab é世😀\n"), max_size=12)
cut_lists = st.lists(st.integers(0, 12), max_size=5)


@given(reply=texts, cuts=cut_lists, max_tokens=st.none() | st.integers(1, 40))
def test_cuts_change_nothing_of_what_is_yielded(
    reply: str, cuts: list[int], max_tokens: int | None
) -> None:
    worker = Worker(reply, prompt_length=4)
    whole, _, _, _ = _generate(worker, _template(max_tokens=max_tokens), [])
    told, log, pieces, attempts = _generate(worker, _template(max_tokens=max_tokens), cuts)
    assert told.token_ids == whole.token_ids
    assert told.text == whole.text == "".join(piece.text for piece in pieces)
    assert [token for piece in pieces for token in piece.token_ids] == whole.token_ids
    assert told.finish_reason == whole.finish_reason
    assert log.ids == [*PROMPT, 7, *whole.token_ids]
    assert told.usage.completion_tokens == len(whole.token_ids)
    assert attempts <= len(cuts) + 1


@given(reply=texts, cuts=cut_lists, stop=st.text(st.sampled_from("ab é"), min_size=1, max_size=3))
def test_a_stop_string_is_found_across_a_cut(reply: str, cuts: list[int], stop: str) -> None:
    worker = Worker(reply, prompt_length=4)
    whole, _, _, _ = _generate(worker, _template(stop_strings=[stop]), [])
    told, log, pieces, _ = _generate(worker, _template(stop_strings=[stop]), cuts)
    assert told.text == whole.text == "".join(piece.text for piece in pieces)
    assert told.stop_string == whole.stop_string
    assert told.token_ids == whole.token_ids
    assert log.ids == [*PROMPT, 7, *whole.token_ids]


@given(reply=texts, cuts=cut_lists, group=st.integers(2, 5))
def test_tokens_survive_cuts_however_they_are_grouped(
    reply: str, cuts: list[int], group: int
) -> None:
    worker = Worker(reply, prompt_length=4, group=group)
    whole, _, _, _ = _generate(worker, _template(), [])
    told, log, _, _ = _generate(worker, _template(), cuts)
    assert told.token_ids == whole.token_ids
    assert log.ids == [*PROMPT, 7, *whole.token_ids]


def test_a_shared_log_is_named_by_its_length_and_another_is_sent() -> None:
    log = TokenLog(PROMPT)
    request = Transcript(_template(), None, log).next_request()
    assert not request.HasField("full_context")
    assert request.expected_context_length == 3
    assert not log.is_shared, "nobody knows what a worker makes of a request without an answer"
    request = Transcript(_template(), None, log).next_request()
    assert list(request.full_context.ids) == PROMPT
    assert not request.HasField("expected_context_length")


def test_a_new_context_replaces_the_log_once_the_worker_has_taken_it() -> None:
    log = TokenLog(PROMPT)
    transcript = Transcript(_template(append=[5]), [1, 9], log)
    assert list(transcript.next_request().full_context.ids) == [1, 9]
    assert log.ids == PROMPT
    transcript.on_started(_started(5))
    assert log.ids == [1, 9, 5]


def test_an_empty_new_context_is_sent_as_such() -> None:
    request = Transcript(_template(), [], TokenLog(PROMPT)).next_request()
    assert request.HasField("full_context")
    assert not request.full_context.ids


def test_the_end_tells_whether_the_logs_agree() -> None:
    log = TokenLog(PROMPT)
    transcript = Transcript(_template(), None, log)
    transcript.next_request()
    transcript.on_started(_started(7))
    transcript.on_delta(_delta(8, text="x"))
    transcript.on_delta(_delta(9, text="y"))
    transcript.on_finished(
        pb.GenerateFinished(reason=pb.FINISH_REASON_STOP, context_length=5, stop_string="y")
    )
    assert log.ids == [*PROMPT, 7, 8]
    assert log.is_shared
    assert (transcript.finish_reason, transcript.stop_string) == (FinishReason.STOP, "y")


def test_a_longer_context_than_the_clients_is_sent_anew() -> None:
    log = TokenLog(PROMPT)
    transcript = Transcript(_template(), None, log)
    transcript.next_request()
    transcript.on_started(_started(7))
    transcript.on_finished(pb.GenerateFinished(context_length=50))
    assert not log.is_shared


def test_a_resumption_carries_what_was_received_and_asks_for_the_rest() -> None:
    transcript = Transcript(_template(max_tokens=10), None, TokenLog(PROMPT))
    transcript.next_request()
    transcript.on_started(_started(7))
    transcript.on_delta(_delta(8, text="x"))
    transcript.on_delta(_delta(9, text="y"))
    request = transcript.next_request()
    assert list(request.full_context.ids) == [*PROMPT, 7, 8, 9]
    assert request.WhichOneof("append") is None
    assert request.max_tokens == 8


def test_tokens_that_may_hold_back_text_are_generated_once_more() -> None:
    transcript = Transcript(_template(max_tokens=10), None, TokenLog(PROMPT))
    transcript.next_request()
    transcript.on_started(_started(7))
    transcript.on_delta(_delta(8, text="x"))
    transcript.on_delta(_delta(9))
    request = transcript.next_request()
    assert list(request.full_context.ids) == [*PROMPT, 7, 8]
    assert request.max_tokens == 9
    transcript.on_started(_started())
    assert transcript.on_delta(_delta(9)) is None
    assert transcript.on_delta(_delta(10, text="é")) == Piece("é", (10,))
    assert transcript.token_ids == [8, 9, 10]


def test_without_a_tokenizer_all_tokens_are_carried() -> None:
    transcript = Transcript(_template(), None, TokenLog(PROMPT))
    transcript.next_request()
    transcript.on_started(_started(7))
    for token in range(20):
        transcript.on_delta(_delta(token))
    request = transcript.next_request()
    assert list(request.full_context.ids) == [*PROMPT, 7, *range(20)]


def test_other_tokens_at_the_seam_are_noticed_and_then_left_out() -> None:
    log = TokenLog(PROMPT)
    transcript = Transcript(_template(), None, log)
    transcript.next_request()
    transcript.on_started(_started(7))
    transcript.on_delta(_delta(8, text="x"))
    transcript.on_delta(_delta(9))
    transcript.next_request()
    transcript.on_started(_started())
    with pytest.raises(DivergedError):
        transcript.on_delta(_delta(99, text="z"))
    transcript.fold_all()
    assert list(transcript.next_request().full_context.ids) == [*PROMPT, 7, 8, 9]
    assert transcript.token_ids == [8, 9]
    assert log.ids == [*PROMPT, 7, 8, 9]


@pytest.mark.parametrize(
    ("template", "eos", "reason"),
    [
        (_template(max_tokens=2), set(), FinishReason.LENGTH),
        (_template(stop_token_ids=[9]), set(), FinishReason.STOP),
        (_template(), {9}, FinishReason.STOP),
        (_template(ignore_eos=True), {9}, None),
        (_template(max_tokens=3), set(), None),
        (_template(stop_strings=["q"]), {9}, None),
    ],
)
def test_when_only_the_end_is_missing_it_is_not_asked_for(
    template: pb.GenerateRequest, eos: set[int], reason: FinishReason | None
) -> None:
    transcript = Transcript(template, None, TokenLog(PROMPT))
    transcript.next_request()
    transcript.on_started(_started(7))
    transcript.on_delta(_delta(8, 9, text="xy"))
    transcript.end_if_complete(eos)
    assert transcript.finish_reason is reason


def test_a_piece_without_anything_new_is_none() -> None:
    transcript = Transcript(_template(), None, TokenLog(PROMPT))
    transcript.next_request()
    transcript.on_started(_started(7))
    assert transcript.on_delta(pb.GenerateDelta()) is None
    assert transcript.on_delta(pb.GenerateDelta(text="held")) == Piece("held", ())
