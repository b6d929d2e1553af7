"""The fake itself: what a user's test relies on."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import djinn_client as djinn
from djinn_client import _fake_model, sync
from djinn_client.testing import FakeServer, fake_server


async def test_replies_come_in_order_and_then_are_made_up() -> None:
    async with (
        FakeServer(["one", "two"]) as fake,
        await djinn.connect(fake.endpoint) as client,
        client.session() as agent,
    ):
        texts = [await agent.generate_text("x") for _ in range(3)]
        assert texts == ["one", "two", "[11 tokens read]"]
        fake.add_reply("four")
        assert await agent.generate_text("x") == "four"


async def test_a_script_for_an_agent_with_a_tool() -> None:
    async def agent_of_a_user(client: djinn.Client) -> str:
        async with client.session(name="researcher") as agent:
            plan = await agent.generate_text("Plan.")
            async with agent.tool("web_search", expected_s=12):
                result = plan.upper()
            return await agent.generate_text(result)

    async with FakeServer(["djinns", "spirits"]) as fake:
        async with await djinn.connect(fake.endpoint) as client:
            assert await agent_of_a_user(client) == "spirits"
        assert [signal.phase for signal in fake.signals] == ["IO_WAIT", "COMPUTE"]
        assert [request.append for request in fake.requests] == ["Plan.", "DJINNS"]


async def test_an_unknown_reason_is_refused() -> None:
    with pytest.raises(ValueError, match="ENGINE_LOST"):
        FakeServer().fail("Generate", "ENGINE_GONE")


async def test_the_worker_can_be_asked_what_it_has() -> None:
    async with (
        FakeServer(["ab"]) as fake,
        await djinn.connect(fake.endpoint) as client,
        client.session() as agent,
    ):
        assert fake.worker_context(agent.session_id) is None
        await agent.generate_text("x", max_tokens=2)
        assert fake.worker_context(agent.session_id) == tuple(b"xab")
        assert not fake.is_generating(agent.session_id)
        assert fake.generated_tokens == 2


def test_it_runs_in_a_thread() -> None:
    with fake_server(["hello"]) as fake, sync.connect(fake.endpoint) as client:
        with client.session() as agent:
            fake.hold_tokens()
            fake.release_tokens()
            assert agent.generate_text("x") == "hello"
        assert fake.requests[0].append == "x"


@given(st.text(), st.lists(st.text(min_size=1, max_size=3), max_size=3))
def test_streamed_text_is_the_text_up_to_a_stop_string(text: str, stops: list[str]) -> None:
    stream = _fake_model.TextStream(stops)
    shown = ""
    for token in _fake_model.encode(text):
        shown += stream.push(token)
        if stream.stop_string:
            break
    else:
        shown += stream.flush()
    ends = [(text.find(stop) + len(stop), stop) for stop in stops if stop in text]
    if ends:
        first = min(end for end, _ in ends)
        assert stream.stop_string in {stop for end, stop in ends if end == first}
        assert shown == text[: first - len(stream.stop_string)]
    else:
        assert not stream.stop_string
        assert shown == text


def test_the_model_depends_on_the_context_alone() -> None:
    model = _fake_model.ScriptedModel()
    model.add("abc")
    context = [1, 2]
    said: list[int] = []
    for _ in range(4):
        said.append(model.next_token([*context, *said], ignore_eos=False))
    assert said == [*b"abc", _fake_model.EOS]
    assert model.next_token([1, 2, ord("a")], ignore_eos=False) == ord("b")
    assert model.next_token([1, 2], ignore_eos=False) == ord("a")


def test_without_an_end_it_goes_on_talking() -> None:
    model = _fake_model.ScriptedModel()
    context = [1, 2]
    for _ in range(100):
        context.append(model.next_token(context, ignore_eos=True))
    assert _fake_model.EOS not in context


def test_texts_and_chats() -> None:
    assert _fake_model.decode(_fake_model.encode("é😀")) == "é😀"
    assert _fake_model.decode([104, _fake_model.EOS]) == "h"
    assert _fake_model.render([("system", "a"), ("user", "b")]) == (
        "<|system|>a\n<|user|>b\n<|assistant|>"
    )
