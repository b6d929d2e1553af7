"""The transfer benchmark moves what it says, over the worker's own pools and streams."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from bench import _floors, transfer
from bench._kv_bench import KvBench
from bench.transfer import TransferBench

MODEL = _floors.model_shape("dummy:tiny", "cpu")
LAYOUT = MODEL.chosen_layout("cpu")


@pytest.fixture
def kv() -> Iterator[KvBench]:
    bench = KvBench(LAYOUT, 6, torch.device("cpu"))
    yield bench
    bench.close()


def test_no_two_blocks_of_a_session_adjoin(kv: KvBench) -> None:
    session = kv.session("one", 3 * LAYOUT.block_size_tokens)
    kv.move(lambda: kv.mover.evict(session))
    for slots in (
        [block.device for block in session.kv.blocks if block.device is not None],
        [block.host for block in session.kv.blocks if block.host is not None],
    ):
        assert len(slots) == 3
        assert all(abs(a - b) > 1 for a, b in pairwise(slots))


def test_all_bytes_move_each_time() -> None:
    bench = TransferBench(MODEL, 3 * LAYOUT.block_size_tokens - 5, torch.device("cpu"))
    counters = bench._kv.mover.counters
    stored, loaded = counters.stored_bytes, counters.loaded_bytes

    bench.evict_and_restore()
    assert counters.stored_bytes - stored == bench.session_bytes
    assert counters.loaded_bytes - loaded == bench.session_bytes

    bench.both_at_once()
    assert counters.stored_bytes - stored == 3 * bench.session_bytes
    assert counters.loaded_bytes - loaded == 2 * bench.session_bytes

    _, moved = bench.evict_clean()
    assert moved == LAYOUT.block_bytes
    bench.close()


def test_it_prints_a_table_and_writes_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "transfer.json"
    flags = ["--tokens=40", "--rounds=2", "--copy-mib=1", f"--json={file}"]

    assert transfer.main(flags) == 0

    rows = {row["name"]: row for row in json.loads(file.read_text())["rows"]}
    assert rows[transfer.PLAIN_LOAD]["moved_bytes"] == 1 << 20
    assert rows[transfer.RESTORE]["moved_bytes"] == 3 * LAYOUT.block_bytes
    assert rows[transfer.RESTORE]["copy_ratio"] == pytest.approx(
        rows[transfer.RESTORE]["bytes_per_s"] / rows[transfer.PLAIN_LOAD]["bytes_per_s"]
    )
    assert rows[transfer.CLEAN]["ratio"] == pytest.approx(1 / 3)
    assert "ratio" in capsys.readouterr().out
