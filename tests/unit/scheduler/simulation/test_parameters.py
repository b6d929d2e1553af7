import json

import msgspec
import pytest

from services.common.errors import ConfigError
from services.scheduler.simulation import parameters
from services.scheduler.simulation.parameters import StepModel
from tests.support.simulated import TOKEN_BYTES, worker_parameters


@pytest.mark.parametrize("name", parameters.shipped())
def test_every_shipped_file_is_valid_and_says_where_it_is_from(name):
    loaded = parameters.load(name)
    assert loaded.source
    assert loaded.device_blocks > 1000


def test_a_step_is_its_width_and_the_kv_it_reads():
    model = StepModel(worker_parameters())
    read_s = TOKEN_BYTES / 4.3e12
    assert model.seconds(1, 0) == pytest.approx(0.005)
    assert model.seconds(64, 1000) == pytest.approx(0.006 + 1000 * read_s)
    # Halfway between two measured points, and as far beyond the last one.
    assert model.seconds(160, 0) == pytest.approx(0.001 + 0.0065)
    assert model.seconds(1024 + 768, 0) == pytest.approx(0.001 + 0.024 + 0.016)


def test_attention_over_a_long_prompt_takes_its_pairs():
    made = worker_parameters()
    times = msgspec.structs.replace(made.step, attention_s_per_pair=1e-9)
    model = StepModel(msgspec.structs.replace(made, step=times))
    assert model.seconds(256, 0, pairs=1e6) == pytest.approx(0.009 + 0.001)


def test_rows_are_read_from_a_bench_result(tmp_path):
    shapes = [
        # (sequences, context, new, milliseconds)
        (1, 999, 1, 5.0),
        (8, 999, 1, 9.0),
        (8, 0, 32, 12.0),
        (33, 1100, 0, 99.0),
    ]
    rows = [
        {"shape": {"sequences": s, "context": c, "new": n}, "step_ms": ms} for s, c, n, ms in shapes
    ]
    path = tmp_path / "step.json"
    path.write_text(json.dumps({"rows": rows}))
    # 1,000 tokens of KV of 1 kB at 1 GB/s take 1 ms.
    found = parameters.rows_from_bench(path, 1000, 1e9)
    assert found == [(1, 0.004), (8, pytest.approx(0.004)), (256, pytest.approx(0.011744))]


def test_a_malformed_file_is_one_line(tmp_path):
    path = tmp_path / "p.json"
    path.write_text('{"source": "x", "modle": 3}')
    with pytest.raises(ConfigError, match=r"p\.json: Object contains unknown field `modle`"):
        parameters.load(str(path))
    with pytest.raises(ConfigError, match=r"nothing: No such file.*shipped are h200-llama-2-7b"):
        parameters.load("nothing")
    (tmp_path / "bench.json").write_text("{}")
    with pytest.raises(ConfigError, match="not a result of bench step"):
        parameters.rows_from_bench(tmp_path / "bench.json", 1, 1.0)


def test_points_that_fall_and_pools_too_small_are_refused():
    made = worker_parameters()
    falling = msgspec.structs.replace(made.step, rows=[(1, 0.004), (8, 0.003)])
    with pytest.raises(ConfigError, match="points that rise"):
        parameters.check(msgspec.structs.replace(made, step=falling), "x")
    with pytest.raises(ConfigError, match="less than a block"):
        parameters.check(msgspec.structs.replace(made, device_pool_bytes=1), "x")
