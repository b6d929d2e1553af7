"""The simulator's records against those of the load generator, whose report reads them."""

import pytest

from loadgen import record as loadgen
from services.common.errors import ConfigError
from services.scheduler.simulation import result

PAIRS = [
    (result.AgentRecord, loadgen.AgentRecord),
    (result.Failure, loadgen.Failure),
    (result.KvFound, loadgen.KvFound),
    (result.RequestRecord, loadgen.RequestRecord),
    (result.SignalRecord, loadgen.SignalRecord),
    (result.StatsRecord, loadgen.StatsRecord),
    (result.ToolRecord, loadgen.ToolRecord),
]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=lambda kind: kind.__name__)
def test_every_field_is_one_that_reports_read(ours, theirs):
    assert set(ours.__struct_fields__) <= set(theirs.__struct_fields__)
    assert ours.__struct_config__.tag == theirs.__struct_config__.tag
    assert (result.REQUESTS_FILE, result.RUN_FILE) == (loadgen.REQUESTS_FILE, loadgen.RUN_FILE)


def test_a_folder_with_a_run_is_refused(tmp_path):
    result.RunFolder(tmp_path / "run").finish({})
    with pytest.raises(ConfigError, match="holds a run already"):
        result.RunFolder(tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--out"):
        result.RunFolder(tmp_path / "file" / "run")
