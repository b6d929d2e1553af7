import argparse
import sys
from pathlib import Path

import pytest

from loadgen import demo
from loadgen.errors import ServerError
from services import server as djinn_server

ARGUMENTS = argparse.Namespace(model="smollm2", device_pool_gib=0.011, host_swap_pool_gb=0.5)
READY = """
import signal, sys
print("warming up", flush=True)
print("agents connect to 127.0.0.1:4711 (model tiny, policy semantic)", flush=True)
print("Djinn runtime initialized", flush=True)
signal.sigwait([signal.SIGTERM])
print("draining", flush=True)
"""
# SIGTERM must not end the process before it waits for it.
READY = "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])\n" + READY


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


async def test_a_server_is_found_by_what_it_says_and_stopped_in_order(tmp_path):
    log = tmp_path / "server.log"
    async with demo.server(python(READY), log) as endpoint:
        assert endpoint == "127.0.0.1:4711"
        assert "warming up" in log.read_text()
    assert log.read_text().endswith("draining\n")


async def test_a_server_that_does_not_start_says_why(tmp_path):
    log = tmp_path / "server.log"
    code = "import sys; print('loading', flush=True); sys.exit('--model x: no such model')"
    with pytest.raises(
        ServerError, match=r"did not start: --model x: no such model \(see"
    ) as error:
        async with demo.server(python(code), log):
            pytest.fail("it is not there")
    assert "\n" not in str(error.value)
    assert "loading" in log.read_text()


async def test_a_server_that_never_gets_ready_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "START_TIMEOUT_S", 0.2)
    with pytest.raises(ServerError, match=r"not ready within 0\.2 s"):
        async with demo.server(python("import signal; signal.pause()"), tmp_path / "log"):
            pytest.fail("it is not ready")


async def test_a_server_is_stopped_when_the_run_fails(tmp_path):
    with pytest.raises(RuntimeError, match="the run failed"):
        async with demo.server(python(READY), tmp_path / "log"):
            raise RuntimeError("the run failed")
    assert (tmp_path / "log").read_text().endswith("draining\n")


def test_djinn_server_takes_the_flags():
    command = demo.server_command(ARGUMENTS, Path("runs/x"))
    assert command[1:3] == ["-m", "services.server"]
    parsed = djinn_server.parser().parse_args(command[3:])
    assert djinn_server.policy_name(parsed) == "semantic"
    assert (parsed.port, parsed.worker_port) == (0, 0)
    assert parsed.trace_file == Path("runs/x/traces-server.jsonl")


def test_the_line_that_says_where_agents_connect_is_the_servers_own():
    assert demo.READY_LINE == djinn_server.READY_LINE


def test_a_missing_workload_is_one_line(tmp_path, capsys):
    code = demo.main(["--config", str(tmp_path / "none.yaml"), "--out", str(tmp_path / "run")])
    assert code == 2
    assert capsys.readouterr().err == f"demo: {tmp_path}/none.yaml: No such file or directory\n"
