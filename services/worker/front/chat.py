"""Chat turns as the continuation of a context, by the model's own template.

A chat template renders whole conversations; a session's context already holds the tokens of what
was said, so only what the new turns add is wanted. It is found by rendering a made-up exchange
with the turns behind it: what follows the made-up answer is the continuation.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from services.common.errors import InvalidRequestError, UnsupportedError
from services.worker.front.tokenizer import TextModel

_QUESTION = "djinn question"
_ANSWER = "djinn answer"
_PAST = ({"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER})


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn to append.

    Attributes:
        role: ``user``, ``system``, ``tool`` or whatever the template knows.
        content: What was said.
    """

    role: str
    content: str


class ChatTemplate:
    """Renders turns as ids to append to a context."""

    def __init__(self, text: TextModel) -> None:
        """Compiles the template.

        Raises:
            UnsupportedError: The model has no template, or one that Jinja refuses.
        """
        if text.chat_template is None:
            raise UnsupportedError("append_chat: the model has no chat template")
        self._text = text
        try:
            self._template = _environment().from_string(text.chat_template)
        except jinja2.TemplateError as error:
            raise UnsupportedError(f"append_chat: bad chat template: {error}") from error

    def can_continue(self) -> bool:
        """Returns True if a user's turn can be appended to a conversation."""
        try:
            self.render([Turn("user", _QUESTION)], last_token=None, empty=False)
        except (UnsupportedError, InvalidRequestError):
            return False
        return True

    def render(self, turns: Sequence[Turn], *, last_token: int | None, empty: bool) -> list[int]:
        """Returns the ids that append `turns` and open the assistant's turn.

        Args:
            turns: What to append, at least one.
            last_token: The context's last token, if known: if it already is the end-of-turn
                token that closes the assistant's last turn, that token is not put twice.
            empty: True if the context is empty, so that the conversation begins here.

        Raises:
            InvalidRequestError: The template refuses these turns, such as an unknown role.
            UnsupportedError: The template changes what was said before, so that a context cannot
                be continued.
        """
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        if empty:
            return self._text.encode(self._render(messages), first=False)
        rendered = self._render([*_PAST, *messages])
        past = self._render(list(_PAST), open_turn=False)
        answer_end = past.rfind(_ANSWER) + len(_ANSWER)
        if answer_end < len(_ANSWER) or not rendered.startswith(past[:answer_end]):
            raise UnsupportedError(
                "append_chat: the model's chat template rewrites earlier turns, so a context "
                "cannot be continued with it; render it yourself and send full_context"
            )
        continuation = rendered[answer_end:]
        end_of_turn = self._text.special_tokens.get("eos_token")
        if end_of_turn and continuation.lstrip().startswith(end_of_turn):
            continuation = continuation.lstrip()
        ids = self._text.encode(continuation, first=False)
        return ids[1:] if ids and ids[0] == last_token else ids

    def _render(self, messages: list[dict[str, str]], *, open_turn: bool = True) -> str:
        try:
            return self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=open_turn,
                **self._text.special_tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise InvalidRequestError.of_field(
                "append_chat", f"the model's chat template refuses these turns: {error}"
            ) from error


class _GenerationTag(jinja2.ext.Extension):
    """Accepts ``{% generation %}`` blocks, which mark the assistant's words, as plain text."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own interface

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def _environment() -> jinja2.Environment:
    """Returns an environment like the one that chat templates are written for."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    # Local time, as the templates' authors saw it.
    return datetime.now().astimezone().strftime(layout)
