import pytest

from loadgen import cli
from loadgen.config import RunConfig, Workload
from loadgen.record import REQUESTS_FILE, AgentRecord, RunInfo, encode, write_run


def write(folder, failure=None, interrupted=False):
    workload = Workload(total_agents=1, arrival_rate=1, think_time_min=0, think_time_max=0)
    info = RunInfo(
        name="n",
        config=RunConfig(workload),
        config_file="c.yaml",
        target="djinn",
        server="s:1",
        model={"model": "tiny"},
        start_unix_ns=1,
        interrupted=interrupted,
    )
    write_run(folder, info)
    agents = [] if failure else [AgentRecord(0, "a", 0.0, 0.0, 1.0)]
    (folder / REQUESTS_FILE).write_bytes(encode(agents))


def test_report_says_by_its_exit_code_whether_all_is_as_expected(tmp_path, capsys):
    write(tmp_path)
    assert cli.main(["report", str(tmp_path)]) == 0
    assert "success_count" in capsys.readouterr().out
    assert (tmp_path / "report.json").exists()
    write(tmp_path, failure=True)
    assert cli.main(["report", str(tmp_path)]) == 1
    write(tmp_path, interrupted=True)
    assert cli.main(["report", str(tmp_path)]) == 130


def test_json_is_the_report_alone(tmp_path, capfdbinary):
    write(tmp_path)
    assert cli.main(["report", str(tmp_path), "--json"]) == 0
    assert capfdbinary.readouterr().out == (tmp_path / "report.json").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "none.yaml"], "none.yaml: No such file or directory"),
        (["run", "bad.yaml"], "bad.yaml:1: workload: expected a mapping, got 3"),
        (["report", "nowhere"], "nowhere/run.json: No such file or directory"),
        (["trace", "."], "no trace files (traces*.jsonl) there; run with --trace"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text("workload: 3")
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("djinn-loadgen: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["run", "x.yaml", "--set", "seed"],
        ["run", "x.yaml", "--processes", "0"],
        ["run", "x.yaml", "--seed", "-1"],
        ["run", "x.yaml", "--target", "nothing"],
        ["trace", "x", "--slowest", "many"],
    ],
)
def test_wrong_flags_end_with_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().err
