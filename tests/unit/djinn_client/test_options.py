from __future__ import annotations

import pytest

import djinn_client as djinn
from djinn.v1 import inference_service_pb2 as pb
from djinn_client._options import request_of, span_attributes_of
from djinn_client._types import GenerateOptions


def test_nothing_asked_for_is_nothing_sent() -> None:
    request = request_of("s", None, {})
    assert request.request_id
    request.ClearField("request_id")
    assert request == pb.GenerateRequest(session_id="s")


def test_everything_asked_for_is_sent() -> None:
    options: GenerateOptions = {
        "max_tokens": 5,
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.75,
        "seed": 2**64 - 1,
        "stop": ["a", "b"],
        "stop_token_ids": [7],
        "ignore_eos": True,
        "logprobs": 0,
        "return_logits": True,
        "request_id": "r",
    }
    assert request_of("s", "text", options) == pb.GenerateRequest(
        session_id="s",
        request_id="r",
        append_text="text",
        sampling=pb.SamplingParams(temperature=0.5, top_k=3, top_p=0.75, seed=2**64 - 1),
        max_tokens=5,
        stop_strings=["a", "b"],
        stop_token_ids=[7],
        ignore_eos=True,
        logprobs=0,
        return_logits=True,
    )


def test_none_is_like_leaving_it_out() -> None:
    options: GenerateOptions = {
        "max_tokens": None,
        "temperature": None,
        "seed": None,
        "logprobs": None,
        "request_id": "r",
    }
    assert request_of("s", None, options) == pb.GenerateRequest(session_id="s", request_id="r")


def test_one_stop_string_is_one() -> None:
    assert request_of("s", "x", {"stop": "END"}).stop_strings == ["END"]


def test_greedy_needs_no_seed() -> None:
    assert not request_of("s", "x", {"temperature": 0.0}).sampling.HasField("seed")
    assert request_of("s", "x", {"temperature": 0.1}).sampling.HasField("seed")
    assert request_of("s", "x", {"temperature": 0.1, "seed": 0}).sampling.seed == 0


def test_a_name_that_does_not_exist() -> None:
    with pytest.raises(TypeError, match="stopp, tempratur"):
        request_of("s", "x", {"tempratur": 1, "stopp": ""})  # type: ignore[typeddict-unknown-key]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", pb.GenerateRequest(append_text="")),
        ([], pb.GenerateRequest(append_token_ids=pb.TokenIds())),
        (range(3), pb.GenerateRequest(append_token_ids=pb.TokenIds(ids=[0, 1, 2]))),
        (
            djinn.user("hi"),
            pb.GenerateRequest(
                append_chat=pb.ChatTurns(turns=[pb.ChatTurn(role="user", content="hi")])
            ),
        ),
        (
            (djinn.system("a"), djinn.tool_result("b")),
            pb.GenerateRequest(
                append_chat=pb.ChatTurns(
                    turns=[
                        pb.ChatTurn(role="system", content="a"),
                        pb.ChatTurn(role="tool", content="b"),
                    ]
                )
            ),
        ),
    ],
)
def test_prompts(prompt: djinn.Prompt, expected: pb.GenerateRequest) -> None:
    request = request_of("", prompt, {})
    request.ClearField("request_id")
    assert request == expected


def test_an_array_of_token_ids() -> None:
    numpy = pytest.importorskip("numpy")
    request = request_of("s", numpy.array([1, 2, 3], dtype=numpy.int64), {})
    assert list(request.append_token_ids.ids) == [1, 2, 3]


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        (3.5, "prompt"),
        ([djinn.user("x"), 1], "prompt"),
        ([1.5], "append_token_ids"),
        ([None], "append_token_ids"),
        ([2**31], "append_token_ids"),
        (["text"], "append_token_ids"),
    ],
)
def test_prompts_of_the_wrong_type(prompt: object, field: str) -> None:
    with pytest.raises(djinn.InvalidRequestError) as caught:
        request_of("s", prompt, {})  # type: ignore[arg-type]
    assert caught.value.field == field
    assert "\n" not in caught.value.message


def test_a_span_names_only_what_was_asked_for() -> None:
    attributes = span_attributes_of(request_of("s", "x", {"request_id": "r", "max_tokens": 3}))
    assert attributes == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.conversation.id": "s",
        "djinn.request.id": "r",
        "gen_ai.request.max_tokens": 3,
    }


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        ("half \ud83d", "append_text"),
        (djinn.user("half \ud83d"), "append_chat"),
        ([djinn.user(7)], "append_chat"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_text_is_refused_by_name(prompt: djinn.Prompt, field: str) -> None:
    with pytest.raises(djinn.InvalidRequestError) as caught:
        request_of("s", prompt, {})
    assert caught.value.field == field


@pytest.mark.parametrize("stop", ["", ["a", ""]])
def test_an_empty_stop_string_is_refused(stop: str | list[str]) -> None:
    with pytest.raises(djinn.InvalidRequestError) as caught:
        request_of("s", "x", {"stop": stop})
    assert caught.value.field == "stop"
