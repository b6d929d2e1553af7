import msgspec
import pytest

from loadgen import preparation
from loadgen.config import Prompts, Workload
from loadgen.errors import LoadgenError, RunFileError
from loadgen.record import REQUESTS_FILE
from loadgen.targets.base import TargetInfo

WORKLOAD = Workload(total_agents=2, arrival_rate=1.0, think_time_min=1.0, think_time_max=1.0)
INFO = TargetInfo(100, 1156, has_chat=False, has_tokenizer=False, model={"model": "tiny"})


def test_a_workload_that_just_fits():
    preparation.check_fits(WORKLOAD, INFO, "w.yaml")


def test_a_context_that_grows_too_long_is_refused_before_the_run():
    small = msgspec.structs.replace(INFO, max_context_length=1155)
    with pytest.raises(LoadgenError, match=r"grow to 1156 tokens .* limit of tiny is 1155"):
        preparation.check_fits(WORKLOAD, small, "w.yaml")


def test_stories_need_a_chat_template():
    stories = msgspec.structs.replace(WORKLOAD, prompts=Prompts.STORIES)
    with pytest.raises(LoadgenError, match=r"workload\.prompts: stories needs a chat template"):
        preparation.check_fits(stories, INFO, "w.yaml")
    preparation.check_fits(stories, msgspec.structs.replace(INFO, has_chat=True), "w.yaml")


def test_a_run_gets_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = preparation.run_folder("my run/1", None)
    assert folder.is_dir()
    assert folder.parent.name == "runs"
    assert folder.name.endswith("-my-run-1")


def test_a_run_is_never_written_over(tmp_path):
    assert preparation.run_folder("x", tmp_path) == tmp_path
    (tmp_path / REQUESTS_FILE).touch()
    with pytest.raises(RunFileError, match="holds a run already"):
        preparation.run_folder("x", tmp_path)
    with pytest.raises(RunFileError, match=r"File exists|Not a directory"):
        preparation.run_folder("x", tmp_path / REQUESTS_FILE)


@pytest.mark.parametrize(
    ("cores", "agents", "processes"),
    [(1, 9, 1), (2, 1000, 1), (6, 999, 3), (16, 10, 1), (16, 33, 2), (16, 1000, 12)],
)
def test_client_processes_leave_the_server_cores_of_its_own(monkeypatch, cores, agents, processes):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(cores)))
    assert preparation.default_processes(agents) == processes
