from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.worker.front.stop_strings import StopStrings

LETTERS = st.text(alphabet="ab", max_size=12)
STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3)


@given(st.lists(LETTERS, max_size=8), STOPS)
def test_text_is_cut_before_the_first_stop_and_nothing_is_lost(
    pieces: list[str], stops: list[str]
) -> None:
    watcher = StopStrings(stops)
    shown, seen = "", ""
    for piece in pieces:
        cut = watcher.push(piece)
        shown += cut.text
        seen += piece
        if cut.stop is not None:
            assert cut.stop in stops
            assert seen.startswith(shown + cut.stop)
            assert not any(stop in shown for stop in stops)
            assert not any(stop in seen[: -len(piece)] for stop in stops)
            return
        assert seen.startswith(shown)
        # Nothing is held back that could not become a stop string.
        held = seen[len(shown) :]
        assert not held or any(stop.startswith(held) for stop in stops)
    assert not any(stop in seen for stop in stops)
    assert shown + watcher.flush() == seen


def test_the_earliest_stop_counts_and_of_those_the_longest() -> None:
    assert StopStrings(["b", "bc", "c"]).push("abc").stop == "bc"
    assert StopStrings(["c", "b"]).push("abc").stop == "b"


def test_a_false_start_is_shown_once_it_is_one() -> None:
    watcher = StopStrings(["STOP"])
    assert watcher.push("xST").text == "x"
    assert watcher.push("x").text == "STx"
    assert watcher.push("STO").text == ""
    assert watcher.push("P!").stop == "STOP"
