"""Token ids into text while they arrive."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

CONTEXT_TOKENS = 12
"""Prompt tokens a decoder is shown first, so that a generation's first space is not lost."""


_MOST_TOKENS_OF_A_CHARACTER = 4


class Detokenizer:
    """Turns one generation's token ids into text, each piece as soon as it is certain.

    Special tokens give no text. A character that spans several tokens is held back until it is
    whole. Joined, the pieces and `flush` are what decoding all ids at once gives.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_tail: Sequence[int] = ()) -> None:
        """Starts behind a prompt.

        Args:
            tokenizer: Decodes.
            prompt_tail: The last few tokens before the generation. They give no text here, but for
                a character that they begin and the generation ends.
        """
        self._tokenizer = tokenizer
        self._shown, begun = self._split(list(prompt_tail)[-CONTEXT_TOKENS:])
        self._pending: list[int] = []
        self._begun = 0  # how many of the pending tokens are the prompt's
        self._stream = DecodeStream(ids=self._shown or None, skip_special_tokens=True)
        for token_id in begun:
            self.push(token_id)
        self._begun = len(self._pending)

    def push(self, token_id: int) -> str:
        """Takes one token; returns the text that is certain now, often empty."""
        piece = self._step(token_id)
        if piece is None:
            self._pending.append(token_id)
            return ""
        self._begun = 0
        if self._pending:
            self._shown = [*self._pending, token_id]
            self._pending.clear()
        else:
            self._shown = [token_id]
        return piece

    def _step(self, token_id: int) -> str | None:
        """Returns the text that this token has made certain; None: none yet.

        A tokenizer that falls back to bytes shows a run of them as U+FFFD throughout if it turns
        out to be no text, what had been certain before included. The stream then refuses this
        token and all that follow. What was given stays; a new stream goes on behind this token.
        """
        try:
            return self._stream.step(self._tokenizer, token_id)
        except Exception:  # noqa: BLE001 - the library raises no narrower class
            held = [*self._pending, token_id]
            self._stream = DecodeStream(ids=held, skip_special_tokens=True)
            before = self._decode(self._shown)
            return self._decode([*self._shown, *held])[len(before) :]

    def flush(self) -> str:
        """Returns what was held back: U+FFFD for bytes that never became a character."""
        if len(self._pending) <= self._begun:
            return ""
        before = self._decode(self._shown)
        after = self._decode([*self._shown, *self._pending])
        self._shown, self._pending = [*self._shown, *self._pending], []
        return after[len(before) :]

    def _split(self, tail: list[int]) -> tuple[list[int], list[int]]:
        """Returns the tokens that end with a whole character, and those of one just begun."""
        for begun in range(min(_MOST_TOKENS_OF_A_CHARACTER, len(tail) + 1)):
            whole = tail[: len(tail) - begun]
            if not self._decode(whole).endswith("\ufffd"):
                return whole, tail[len(whole) :]
        return [], []  # bytes that are no text

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)
