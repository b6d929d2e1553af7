import importlib.util

import pytest

from loadgen import figure
from loadgen.errors import LoadgenError, RunFileError
from loadgen.record import RequestRecord

RECORDS = [
    RequestRecord(
        agent=0,
        step=step,
        scheduled_s=0.0,
        compute_s=0.0,
        sent_s=0.0,
        first_token_s=0.1 * (step + 1),
        end_s=1.0,
    )
    for step in range(3)
]


def test_shares_reach_one():
    assert figure.shares([3.0, 1.0, 2.0, 2.0]) == ([1.0, 2.0, 2.0, 3.0], [0.25, 0.5, 0.75, 1.0])


def test_a_figure_names_its_systems(tmp_path):
    path = tmp_path / "a.svg"
    figure.draw("some title", {"djinn": RECORDS, "peer": RECORDS, "dead": []}, path)
    text = path.read_text()
    assert "some title" in text
    assert "djinn" in text
    assert "dead" not in text
    figure.draw("nothing at all", {"dead": []}, tmp_path / "b.png")
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(RunFileError, match="No such file or directory"):
        figure.draw("t", {"djinn": RECORDS}, tmp_path / "none" / "a.svg")


def test_without_matplotlib_it_says_how_to_get_it(monkeypatch):
    figure.check_available()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LoadgenError, match=r"pip install 'djinn-serving\[plots\]'"):
        figure.check_available()
