"""The toy language model behind `djinn_client.testing`: bytes are tokens, replies are scripted."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final

EOS: Final = 256
VOCAB_SIZE: Final = 257


def encode(text: str) -> list[int]:
    """Returns text as token ids: its UTF-8 bytes."""
    return list(text.encode())


def decode(ids: Iterable[int]) -> str:
    """Returns token ids as text; what is not UTF-8 becomes replacement characters."""
    return bytes(token for token in ids if token != EOS).decode(errors="replace")


def render(turns: Iterable[tuple[str, str]]) -> str:
    """Returns turns of (role, content) as the toy chat template has them."""
    return "".join(f"<|{role}|>{content}\n" for role, content in turns) + "<|assistant|>"


class ScriptedModel:
    """Continues a context with scripted replies.

    Like a greedy model it depends on the context only: a generation that was cut is continued
    where it ended, whoever asks.
    """

    def __init__(self) -> None:
        self._scripted: deque[str] = deque()
        self._given: list[tuple[list[int], list[int]]] = []

    def add(self, reply: str) -> None:
        """Adds a reply for the next context that is new."""
        self._scripted.append(reply)

    def forget_given(self) -> None:
        """Forgets the replies given, as if another model took over."""
        self._given.clear()

    def next_token(self, context: Sequence[int], *, ignore_eos: bool) -> int:
        """Returns the token after a context."""
        for start, reply in reversed(self._given):
            done = list(context[len(start) :])
            is_ours = list(context[: len(start)]) == start and done == reply[: len(done)]
            if is_ours and len(done) < len(reply):
                return reply[len(done)]
        text = self._scripted.popleft() if self._scripted else f"[{len(context)} tokens read]"
        reply = encode(text)
        if not ignore_eos or not reply:
            reply.append(EOS)
        self._given.append((list(context), reply))
        return reply[0]


class TextStream:
    """Turns ids into text piece by piece and finds stop strings, as a worker's front does."""

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stops = tuple(stop_strings)
        self._held = ""
        self.stop_string = ""

    def push(self, token: int) -> str:
        """Returns the text that is certain after a token; sets `stop_string` when one appears."""
        if token != EOS:
            self._held += self._decoder.decode(bytes([token]))
        for stop in self._stops:
            place = self._held.find(stop)
            if place >= 0:
                self.stop_string = stop
                text, self._held = self._held[:place], ""
                return text
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def flush(self) -> str:
        """Returns the text still held back, at the end."""
        text, self._held = self._held + self._decoder.decode(b"", final=True), ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Returns how many characters at the end of `text` may be the beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
