"""The benchmarks that need a server, each against one of its own, with a small model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import interference, wake
from loadgen.stages import STAGES

pytestmark = pytest.mark.timeout(240)

SPEEDS = {
    "memory_bytes_per_s": 1e10,
    "product_flops": 1e11,
    "load_bytes_per_s": 1e9,
    "store_bytes_per_s": 1e9,
}


@pytest.fixture
def flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Flags that every benchmark here takes, and a server with one thread."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return [
        "--model=dummy:tiny",
        "--device=cpu",
        "--server-flag=--cpu-threads=1",
        f"--server-log={tmp_path / 'server.log'}",
        f"--json={tmp_path / 'result.json'}",
    ]


@pytest.fixture
def floors_flag(tmp_path: Path) -> str:
    file = tmp_path / "floors.json"
    file.write_text(json.dumps({"speeds": SPEEDS}))
    return f"--floors={file}"


def test_an_agent_whose_blocks_were_overwritten_wakes(
    tmp_path: Path, flags: list[str], floors_flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--context=100", "--wakes=2", "--warm-up=1", "--tool-s", "0", "0"]

    assert wake.main([*flags, floors_flag, *sizes, "--append-ms=5"]) == 0

    result = json.loads((tmp_path / "result.json").read_text())
    # 99 of the 100 tokens have KV: seven blocks, all of which must come back.
    block_bytes = 16 * 2048
    assert [wake["kv_bytes"] for wake in result["wakes"]] == [7 * block_bytes] * 2
    assert [wake["found_blocks"] for wake in result["wakes"]] == [0, 0]
    [row] = result["rows"]
    assert row["name"] == "KV copied back"
    assert row["wakes"] == 2
    assert row["floor_ms"] == pytest.approx(5 + 100 * 2048 / 1e9 * 1e3)
    assert row["ratio"] == pytest.approx(row["p50_ms"] / row["floor_ms"])
    stages = {stage["name"]: stage for stage in result["stages"]}
    assert set(stages) == {*STAGES, "unaccounted"}
    assert sum(stage["ratio"] for stage in stages.values()) == pytest.approx(1)
    assert stages["step"]["p50_ms"] > 0
    printed = capsys.readouterr().out
    assert "KV copied back" in printed
    assert "ratio" in printed


def test_live_agents_find_their_blocks(tmp_path: Path, flags: list[str], floors_flag: str) -> None:
    sizes = ["--context=60", "--wakes=6", "--warm-up=0", "--agents=3", "--tool-s", "0.01", "0.02"]

    assert wake.main([*flags, floors_flag, *sizes]) == 0

    result = json.loads((tmp_path / "result.json").read_text())
    assert len(result["wakes"]) == 6
    assert [row["name"] for row in result["rows"]] == ["KV on the device"]
    assert all(wake["found_blocks"] for wake in result["wakes"])


def test_a_server_that_does_not_start_is_one_line(
    flags: list[str], floors_flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert wake.main([*flags, floors_flag, "--server-flag=--max-sessions=-1"]) == 2
    assert "max-sessions" in capsys.readouterr().err


def test_others_move_and_arrive_beside_agents_that_decode(
    tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    decoding = ["--agents=3", "--context=60", "--tokens=30", "--rounds=1", "--processes=2"]
    others = ["--pairs=2", "--moved-context=64", "--prompts-per-s=20", "--prompt-tokens=20"]

    assert interference.main([*flags, *decoding, *others]) == 0

    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    alone, moving, arriving = rows
    assert [row["name"] for row in rows] == [
        interference.ALONE,
        interference.MOVING,
        interference.ARRIVING,
    ]
    assert {row["tokens"] for row in rows} == {3 * (30 - 8 - 1)}
    assert (alone["ratio"], alone["loaded_bytes_per_s"], alone["new_agents"]) == (1, 0, 0)
    assert moving["ratio"] == pytest.approx(moving["p99_ms"] / alone["p99_ms"])
    assert moving["loaded_bytes_per_s"] > 0
    assert moving["stored_bytes_per_s"] > 0
    assert arriving["new_agents"] > 0
    assert arriving["first_token_p99_ms"] > 0
    assert interference.MOVING in capsys.readouterr().out
