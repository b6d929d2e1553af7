from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from djinn.v1 import inference_service_pb2 as pb
from services.common.errors import InvalidRequestError
from services.common.session_token import SessionToken
from services.worker import messages
from services.worker.front.chat import Turn
from services.worker.front.convert import inference
from services.worker.front.generation import Begun, Delta, End
from tests.support.stand_ins import MODEL, started


def request(**fields: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(**{"session_id": "s", **fields})  # type: ignore[arg-type]


def test_what_is_unset_gets_its_default() -> None:
    found = inference.generate_input(request(), MODEL)
    assert (found.create, found.append, found.full_context) == (False, None, None)
    assert (found.max_tokens, found.expected_context_length, found.logprobs) == (None, None, None)
    assert (found.sampling.temperature, found.sampling.top_k, found.sampling.top_p) == (0, 0, 1)
    assert found.request_id


def test_a_seed_is_drawn_if_none_is_given_and_kept_if_one_is() -> None:
    drawn = {inference.generate_input(request(), MODEL).sampling.seed for _ in range(5)}
    assert len(drawn) == 5
    given_seed = request(sampling=pb.SamplingParams(seed=2**64 - 1))
    assert inference.generate_input(given_seed, MODEL).sampling.seed == 2**64 - 1


def test_a_token_tells_how_a_session_is_made() -> None:
    token = SessionToken("s", cache_salt="salt", priority=3).encode()
    found = inference.generate_input(request(session_token=token), MODEL)
    assert (found.create, found.cache_salt, found.priority) == (True, "salt", 3)
    assert found.scheduler_record == token


def test_an_empty_context_differs_from_none() -> None:
    found = inference.generate_input(request(full_context=pb.TokenIds()), MODEL)
    assert found.full_context == []


def test_each_way_to_append_is_told_apart() -> None:
    ids = inference.generate_input(request(append_token_ids=pb.TokenIds(ids=[1])), MODEL)
    text = inference.generate_input(request(append_text="hi"), MODEL)
    chat = pb.ChatTurns(turns=[pb.ChatTurn(role="user", content="hi")])
    turns = inference.generate_input(request(append_chat=chat), MODEL)
    assert (ids.append, text.append) == ([1], "hi")
    assert turns.append == (Turn("user", "hi"),)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"session_id": ""}, "session_id"),
        ({"request_id": "x" * 129}, "request_id"),
        ({"expected_context_length": -1}, "expected_context_length"),
        ({"append_chat": pb.ChatTurns()}, "append_chat.turns"),
        (
            {"append_chat": pb.ChatTurns(turns=[pb.ChatTurn(role="user")])},
            "append_chat.turns[0].content",
        ),
        (
            {"append_chat": pb.ChatTurns(turns=[pb.ChatTurn(content="x")])},
            "append_chat.turns[0].role",
        ),
        ({"stop_strings": ["x"] * 17}, "stop_strings"),
        ({"stop_strings": ["x", ""]}, "stop_strings[1]"),
        ({"stop_strings": ["x" * 257]}, "stop_strings[0]"),
        ({"stop_token_ids": list(range(65))}, "stop_token_ids"),
        ({"logprobs": -1}, "logprobs"),
        ({"sampling": pb.SamplingParams(temperature=float("inf"))}, "sampling.temperature"),
        ({"sampling": pb.SamplingParams(temperature=100.5)}, "sampling.temperature"),
        ({"sampling": pb.SamplingParams(top_p=float("nan"))}, "sampling.top_p"),
        ({"sampling": pb.SamplingParams(top_p=0)}, "sampling.top_p"),
        ({"sampling": pb.SamplingParams(top_k=-1)}, "sampling.top_k"),
    ],
)
def test_a_bad_field_is_named(fields: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        inference.generate_input(request(**fields), MODEL)
    assert caught.value.metadata["field"] == field
    assert caught.value.message.startswith(field)


@given(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=20))
def test_exactly_the_ids_of_the_vocabulary_are_taken(ids: list[int]) -> None:
    sent = request(append_token_ids=pb.TokenIds(ids=ids))
    bad = [i for i in ids if not 0 <= i < 100]
    if not bad:
        assert inference.generate_input(sent, MODEL).append == ids
        return
    with pytest.raises(
        InvalidRequestError, match=f"token id {bad[0]} at index {ids.index(bad[0])}"
    ):
        inference.generate_input(sent, MODEL)


def test_deltas_with_logits_are_split_and_keep_their_order() -> None:
    logits = [bytes([i]) * (inference.MAX_DELTA_BYTES // 2) for i in range(5)]
    sent = list(inference.generate_responses(Delta([1, 2, 3, 4, 5], ["a", "b"], [], logits)))
    assert [list(r.delta.token_ids) for r in sent] == [[1, 2], [3, 4], [5]]
    assert [r.delta.text for r in sent] == ["", "", "ab"]
    assert [each for r in sent for each in r.delta.logits] == logits


def test_start_and_end_are_converted() -> None:
    kv = messages.KvSource(1, 2, 3, 4, 5, load_start_ns=10, load_end_ns=25, prefix_hit_tokens=6)
    (begun,) = inference.generate_responses(Begun(started(kv=kv), [10, 11]))
    assert begun.started.kv.loaded_blocks == 3
    assert begun.started.kv.load_duration.ToNanoseconds() == 15
    assert begun.started.queue_duration.ToNanoseconds() == 1_000
    end = End(messages.FinishReason.STOP, 5, 4, 3, 2, 7, 9, "x")
    (finished,) = inference.generate_responses(end)
    assert finished.finished.reason == pb.FINISH_REASON_STOP
    assert finished.finished.usage.cached_tokens == 4
    assert (finished.finished.context_length, finished.finished.stop_string) == (7, "x")


def test_logprobs_are_converted() -> None:
    likely = messages.TokenLogprob(3, -0.5)
    delta = Delta([3], [], [messages.PositionLogprobs(likely, [likely, likely])], [])
    (sent,) = inference.generate_responses(delta)
    assert sent.delta.logprobs[0].chosen.token_id == 3
    assert len(sent.delta.logprobs[0].top) == 2
