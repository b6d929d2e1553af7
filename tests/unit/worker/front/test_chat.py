from __future__ import annotations

from pathlib import Path

import pytest

from services.common.errors import InvalidRequestError, UnsupportedError
from services.worker.front import tokenizer
from services.worker.front.chat import ChatTemplate, Turn
from services.worker.front.tokenizer import TextModel
from tests.support.text_model import CHATML, END, write_text_model

REWRITES = "{% for message in messages %}{{ loop.length }}:{{ message['content'] }}\n{% endfor %}"
PICKY = (
    "{% for message in messages %}"
    "{% if message['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "[{{ message['role'] }}]{{ message['content'] }} {{ eos_token }}\n"
    "{% endfor %}"
)
MODERN = (
    "{%- for message in messages %}{%- if loop.first %}{{ strftime_now('') }}{% endif %}"
    "{%- if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}"
    "{%- else %}{{ message.content | tojson }}{% endif %}{{ '<|im_end|>' }}"
    "{%- if loop.last %}{% break %}{% endif %}{% endfor %}"
)


# As published with well-known models, shortened where it makes no difference here.
ALTERNATE = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
)
PUBLISHED = {
    "llama-2": (
        "{% for message in messages %}" + ALTERNATE + "{% if message['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
        "<s>[INST] hi [/INST]",
    ),
    "llama-3": (
        (
            "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role']"
            " + '<|end_header_id|>\n\n' + message['content'] | trim + '<|im_end|>' %}"
            "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
            "{{ content }}{% endfor %}{% if add_generation_prompt %}"
            "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
        ),
        (
            "<|start_header_id|>user<|end_header_id|>\n\nhi<|im_end|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        ),
    ),
    "gemma": (
        "{{ bos_token }}{% for message in messages %}"
        + ALTERNATE
        + "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
        "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
        "\n<start_of_turn>user\nhi<|im_end|>\n<start_of_turn>model\n",
    ),
    "with a default system message": (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
        "{% endif %}" + CHATML,
        "\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_templates_can_be_continued(tmp_path: Path, name: str) -> None:
    template, expected = PUBLISHED[name]
    text = text_model(tmp_path, template)
    assert ChatTemplate(text).can_continue()
    end = text.tokenizer.token_to_id(END)
    assert render(text, [Turn("user", "hi")], end) == expected


def text_model(folder: Path, template: str | None = CHATML) -> TextModel:
    return tokenizer.load(write_text_model(folder, template=template))


def render(text: TextModel, turns: list[Turn], last: int | None, *, empty: bool = False) -> str:
    ids = ChatTemplate(text).render(turns, last_token=last, empty=empty)
    decoded: str = text.tokenizer.decode(ids, skip_special_tokens=False)
    return decoded


def test_a_first_turn_is_the_whole_template(tmp_path: Path) -> None:
    turns = [Turn("system", "be brief"), Turn("user", "hi")]
    assert render(text_model(tmp_path), turns, None, empty=True) == (
        "<|im_start|>system\nbe brief<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_continuation_is_the_same_as_rendering_the_whole_conversation(tmp_path: Path) -> None:
    text = text_model(tmp_path)
    chat = ChatTemplate(text)
    end = text.tokenizer.token_to_id(END) or 0
    log = chat.render([Turn("user", "hi")], last_token=None, empty=True)
    log += [*text.encode("hello there", first=False), end]
    log += chat.render([Turn("tool", "42")], last_token=log[-1], empty=False)
    whole = [Turn("user", "hi"), Turn("assistant", "hello there"), Turn("tool", "42")]
    assert log == chat.render(whole, last_token=None, empty=True)


@pytest.mark.parametrize("last", [None, 5])
def test_a_turn_that_was_cut_off_is_closed_first(tmp_path: Path, last: int | None) -> None:
    assert render(text_model(tmp_path), [Turn("user", "hi")], last).startswith(f"{END}\n<|im_start")


def test_space_before_the_end_of_turn_is_not_the_answers(tmp_path: Path) -> None:
    text = text_model(tmp_path, PICKY)
    end = text.tokenizer.token_to_id(END)
    assert render(text, [Turn("user", "hi")], end) == f"\n[user]hi {END}\n"


def test_templates_use_what_transformers_gives_them(tmp_path: Path) -> None:
    text = text_model(tmp_path, MODERN)
    end = text.tokenizer.token_to_id(END)
    assert render(text, [Turn("user", 'a "b" <c>')], end) == '"a \\"b\\" <c>"<|im_end|>'


def test_a_template_that_rewrites_earlier_turns_cannot_be_continued(tmp_path: Path) -> None:
    chat = ChatTemplate(text_model(tmp_path, REWRITES))
    assert not chat.can_continue()
    with pytest.raises(UnsupportedError, match="full_context"):
        chat.render([Turn("user", "hi")], last_token=None, empty=False)
    # A conversation can still be begun.
    assert chat.render([Turn("user", "hi")], last_token=None, empty=True)


def test_turns_that_a_template_refuses_are_the_clients_fault(tmp_path: Path) -> None:
    chat = ChatTemplate(text_model(tmp_path, PICKY))
    assert chat.can_continue()
    with pytest.raises(InvalidRequestError, match="no tools here"):
        chat.render([Turn("tool", "42")], last_token=None, empty=False)


@pytest.mark.parametrize("template", [None, "{% if %}"])
def test_without_a_usable_template_there_is_no_chat(tmp_path: Path, template: str | None) -> None:
    with pytest.raises(UnsupportedError, match="append_chat"):
        ChatTemplate(text_model(tmp_path, template))


def test_a_template_cannot_reach_the_interpreter(tmp_path: Path) -> None:
    chat = ChatTemplate(
        text_model(tmp_path, "{{ messages.__class__.__mro__[1].__subclasses__() }}")
    )
    with pytest.raises(InvalidRequestError, match="unsafe"):
        chat.render([Turn("user", "hi")], last_token=None, empty=True)
