from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.worker.front.detokenize import Detokenizer
from services.worker.front.stop_strings import StopStrings
from services.worker.front.text_stream import TextStream
from tests.support.text_model import byte_tokenizer

TOKENIZER = byte_tokenizer()


def stream(*stops: str) -> TextStream:
    return TextStream(Detokenizer(TOKENIZER), StopStrings(stops) if stops else None)


@given(st.lists(st.lists(st.integers(0, 255), max_size=6), max_size=8), st.booleans())
def test_the_text_does_not_depend_on_how_tokens_come_together(
    batches: list[list[int]], watched: bool
) -> None:
    texts = stream("never in here") if watched else stream()
    text = ""
    for batch in batches:
        taken, piece, stop = texts.push(batch)
        assert (taken, stop) == (len(batch), None)
        text += piece
    piece, stop = texts.flush()
    assert stop is None
    assert text + piece == TOKENIZER.decode([i for batch in batches for i in batch])


def test_tokens_behind_a_stop_string_are_not_taken() -> None:
    texts = stream("é!")
    ids = TOKENIZER.encode("aé!b").ids
    assert texts.push(ids) == (4, "a", "é!")


def test_a_stop_string_may_end_with_the_flush() -> None:
    texts = stream("�")
    assert texts.push(TOKENIZER.encode("aé").ids[:2]) == (2, "a", None)
    assert texts.flush() == ("", "�")


def test_without_a_tokenizer_there_is_no_text() -> None:
    texts = TextStream(None)
    assert texts.push([1, 2, 3]) == (3, "", None)
    assert texts.flush() == ("", None)
