from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.worker.front.detokenize import Detokenizer
from tests.support.text_model import END, byte_fallback_tokenizer, byte_tokenizer

TOKENIZER = byte_tokenizer()
END_ID = TOKENIZER.token_to_id(END) or 0


@given(st.text())
def test_pieces_join_to_the_text(text: str) -> None:
    detokenizer = Detokenizer(TOKENIZER)
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert "".join(map(detokenizer.push, ids)) + detokenizer.flush() == text


# U+FFFD itself looks like an unfinished character.
PROMPTS = st.text(st.characters(exclude_characters="\ufffd", codec="utf-8"), max_size=5)


@given(st.lists(st.integers(0, 255), max_size=40), PROMPTS)
def test_any_bytes_join_to_what_decoding_all_at_once_gives(ids: list[int], prompt: str) -> None:
    detokenizer = Detokenizer(TOKENIZER, TOKENIZER.encode(prompt, add_special_tokens=False).ids)
    pieces = "".join(map(detokenizer.push, ids)) + detokenizer.flush()
    assert pieces == TOKENIZER.decode(ids)


def test_a_character_is_held_back_until_it_is_whole() -> None:
    detokenizer = Detokenizer(TOKENIZER)
    first, *middle, last = TOKENIZER.encode("😀").ids
    assert detokenizer.push(first) == ""
    assert [detokenizer.push(i) for i in middle] == ["", ""]
    assert detokenizer.push(last) == "😀"
    assert detokenizer.flush() == ""


def test_bytes_that_never_become_a_character_come_with_the_flush() -> None:
    detokenizer = Detokenizer(TOKENIZER)
    first = TOKENIZER.encode("é").ids[0]
    assert detokenizer.push(first) == ""
    assert detokenizer.flush() == "�"
    assert detokenizer.flush() == ""


def test_special_tokens_give_no_text() -> None:
    detokenizer = Detokenizer(TOKENIZER)
    ids = [*TOKENIZER.encode("a").ids, END_ID, *TOKENIZER.encode("b").ids]
    assert "".join(map(detokenizer.push, ids)) == "ab"


@given(PROMPTS, st.integers(0, 20))
def test_a_character_begun_by_the_prompt_is_the_generations(text: str, split: int) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    # A prompt that is cut within a character, as when a generation is taken up again.
    whole = TOKENIZER.decode(ids[:split]).rstrip("\ufffd")
    detokenizer = Detokenizer(TOKENIZER, ids[:split])
    made = "".join(map(detokenizer.push, ids[split:])) + detokenizer.flush()
    assert split >= len(ids) or whole + made == text


def test_a_prompt_that_is_no_text_is_not_repeated() -> None:
    detokenizer = Detokenizer(TOKENIZER, TOKENIZER.encode("é").ids[:1] * 9)
    assert "".join(map(detokenizer.push, TOKENIZER.encode("xy").ids)) == "xy"


FALLBACK = byte_fallback_tokenizer()


def test_text_goes_on_behind_bytes_that_are_none() -> None:
    # Once the run of bytes has ended, the library shows all of it as U+FFFD, the "i" included,
    # which was certain before.
    detokenizer = Detokenizer(FALLBACK)
    ids = [FALLBACK.token_to_id(token) or 0 for token in ("<0x69>", "<0xDD>", "▁a", "▁b")]
    assert FALLBACK.decode(ids) == "�� a b"
    pieces = [detokenizer.push(token_id) for token_id in ids]
    assert pieces == ["i", "", "� a", " b"]


@given(st.lists(st.integers(0, FALLBACK.get_vocab_size() - 1), max_size=20), st.integers(0, 5))
def test_no_tokens_at_all_are_too_strange_to_be_shown(ids: list[int], prompt: int) -> None:
    detokenizer = Detokenizer(FALLBACK, ids[:prompt])
    for token_id in ids[prompt:]:
        detokenizer.push(token_id)
    detokenizer.flush()
    end = FALLBACK.token_to_id("▁b") or 0
    assert (detokenizer.push(end) + detokenizer.flush()).endswith("b")
