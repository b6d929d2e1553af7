"""The commands of ``docs/seed.md``, read from it and run against a real server.

What is changed before a command runs: ports become free ones, pools become so small that agents
have to be evicted, the model becomes ``dummy:tiny`` on the CPU, and workloads get fewer agents and
shorter waits.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(240)

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "seed.md").read_text(encoding="utf-8")
READY_LINE = "Djinn runtime initialized"

AGENTS = 16
SCALED = (
    f" --set workload.total_agents={AGENTS} --set workload.arrival_rate=20"
    " --set workload.think_time_min=0.1 --set workload.think_time_max=0.3"
)
# The device holds three contexts of the seed's length, and both sides fewer than AGENTS of them.
DEVICE_POOL_GIB, HOST_POOL_GIB = 0.008, 0.02

NAMES = [
    *("SemanticActivityTracker", "HostSwapPool", "KVSessionManager"),
    *("djinn.server.server_main", "run_poisson_experiment.py", "verify_correctness.py"),
    *("agent_scaling_hero.yaml", "poisson_smoke_test.yaml", "--config", "--model-id"),
    *("correctness_results.json", "poisson_semantic_scheduler_", "torch.allclose"),
    *('signal_phase("IO_WAIT")', 'signal_phase("COMPUTE")', "ensure_initialized_before_async"),
    *("--port", "--gpu", "--enable-semantic-scheduler", "--idle-threshold-seconds"),
    *("--host-swap-pool-gb", "localhost:9095/metrics/vmu", "semantic_scheduler.swap_pool"),
    *("swaps_performed", "experiment", "description", "total_agents", "arrival_rate"),
    *("think_time_min", "think_time_max", "new_tokens", "iterations", "context_length"),
    *("expected_results", "p99_wake_latency_ms", "p99_request_latency_ms", "swaps_gt"),
    *("reason_latency_ms", "wake_latency_ms", "arrival_time_s", "p99_latency_ms"),
    *("success_count", "swap_events", "restore_events", "throughput_ops_per_sec"),
    *(READY_LINE, "Coordinator not available", "Swap pool exhausted", "No swapping occurring"),
    *("High latency", "Experiment hangs", "zombie", "ulimit -l unlimited"),
    *("vLLM (reactive)", "Ray Serverless", "Ray (static)", "ring buffer (Phase 2)"),
]


@dataclass(frozen=True)
class Command:
    """A command as the document has it, and the exit codes that it allows."""

    text: str
    codes: tuple[int, ...] = (0,)

    @property
    def serves(self) -> bool:
        """True if it runs until it is stopped."""
        return self.text.startswith("djinn-server") and self.codes == (0,) and not self.helps

    @property
    def helps(self) -> bool:
        return self.text.endswith("--help")


def commands_of(document: str) -> list[Command]:
    """Returns each command once: fenced blocks, then what stands in the last cell of a row."""
    found: dict[str, Command] = {}
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```$", document, re.MULTILINE | re.DOTALL):
        text = block if language == "bash" else f"{language} - <<'END'\n{block}END"
        found[text] = Command(text.strip())
    for row in re.findall(r"^\|(.*)\|$", document, re.MULTILINE):
        cell = re.split(r"(?<!\\)\|", row)[-1].replace(r"\|", "|")
        for text, *codes in re.findall(r"`([^`]+)`(?: \(exit code (\d)(?: or (\d))?\))?", cell):
            found[text] = Command(text, tuple(int(code) for code in codes if code) or (0,))
    return list(found.values())


START, *COMMANDS = commands_of(DOCUMENT)
BLOCKS = [command for command in COMMANDS if "\n" in command.text]


class Shell:
    """Runs commands in a folder, those first whose files others read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.addresses: dict[str, str] = {}
        self._results: dict[Command, subprocess.CompletedProcess[str]] = {}
        (folder / "loadgen").symlink_to(ROOT / "loadgen")
        programs = folder / "bin"
        programs.mkdir()
        if shutil.which("curl") is None:
            fetch = "import sys, urllib.request as u; print(u.urlopen(sys.argv[2]).read().decode())"
            (programs / "curl").write_text(f"#!/bin/sh\nexec python -c '{fetch}' \"$@\"\n")
            (programs / "curl").chmod(0o755)
        path = [str(programs), str(Path(sys.executable).parent), os.environ["PATH"]]
        self._env = {**os.environ, "PATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}

    def run(self, command: Command) -> subprocess.CompletedProcess[str]:
        """Runs a command to its end."""
        return subprocess.run(
            ["bash", "-o", "pipefail", "-c", self._adapted(command)],
            cwd=self.folder,
            env=self._env,
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )

    def result(self, command: Command) -> subprocess.CompletedProcess[str]:
        """Returns how a command ended, which is run if it has not been yet."""
        if command not in self._results:
            for needed in needs(command):
                self.result(needed)
            self._results[command] = self.run(command)
        return self._results[command]

    @contextmanager
    def serving(self, command: Command) -> Iterator[str]:
        """Runs a server until the end of the block, and yields all it said until it was ready."""
        log = self.folder / "server.log"
        with log.open("w") as stderr:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {self._adapted(command)}"],
                cwd=self.folder,
                env=self._env,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        assert process.stdout is not None
        with process, process.stdout:
            try:
                said = ""
                for line in process.stdout:
                    said += line
                    if READY_LINE in line:
                        break
                else:
                    pytest.fail(f"no {READY_LINE!r}: {log.read_text()}")
                yield said + log.read_text()
                process.send_signal(signal.SIGINT)
                assert process.wait() == 0, log.read_text()
            finally:
                process.kill()

    def _adapted(self, command: Command) -> str:
        text = command.text
        if command.helps:
            return text
        for old, new in self.addresses.items():
            text = text.replace(old, new)
        if text.startswith("djinn-server"):
            text = text.replace("--host-swap-pool-gb 32", "")
            text += " --port=0 --worker-port=0 --metrics-port=0 --worker-metrics-port=0"
            text += f" --device=cpu --device-pool-gib={DEVICE_POOL_GIB} --cpu-threads=1"
            if "--host-swap-pool-gb" not in text:
                text += f" --host-swap-pool-gb={HOST_POOL_GIB}"
            if "--model" not in text:
                text += " --model=dummy:tiny"
        if text.startswith("djinn-loadgen run"):
            text += SCALED
        if (
            text.startswith(("djinn-loadgen run", "djinn-loadgen verify"))
            and "--server" not in text
        ):
            text += f" --server {self.addresses['localhost:5556']}"
        return text

    def report(self, run: str) -> dict[str, Any]:
        """Returns the report of a run of the document's."""
        self.result(maker_of(run))
        report: dict[str, Any] = json.loads((self.folder / run / "report.json").read_text())
        return report


def maker_of(file: str) -> Command:
    """Returns the command that makes a file which others read."""
    made_by = "djinn-loadgen verify" if file == "correctness_results.json" else f"--out {file}"
    return next(command for command in COMMANDS if made_by in command.text)


def needs(command: Command) -> set[Command]:
    files = re.findall(r"runs/\w+|correctness_results\.json", command.text)
    return {maker_of(file) for file in files} - {command}


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    shell = Shell(tmp_path_factory.mktemp("seed"))
    with shell.serving(START) as said:
        ports = [re.search(r"agents connect to \S+:(\d+)", said)]
        ports += re.finditer(r"metrics on http://\S+:(\d+)/", said)
        for known, port in zip((5556, 9095, 9096), ports, strict=True):
            assert port is not None
            shell.addresses[f"localhost:{known}"] = f"127.0.0.1:{port[1]}"
        yield shell


def test_the_document_has_every_name_of_the_seed() -> None:
    assert [name for name in NAMES if name not in DOCUMENT] == []


def test_each_section_of_the_document_has_commands() -> None:
    sections = DOCUMENT.split("\n## ")[1:]

    assert [s for s in sections if not any(command.text in s for command in COMMANDS)] == []


@pytest.mark.parametrize(
    "command", COMMANDS, ids=lambda command: " ".join(command.text.split())[:70]
)
def test_the_command_works(shell: Shell, command: Command) -> None:
    if command.serves:
        with shell.serving(command):
            return
    result = shell.result(command)
    assert result.returncode in command.codes, (result.stdout, result.stderr)
    assert "Traceback" not in result.stderr


def test_the_health_check_says_that_kv_is_swapped(shell: Shell) -> None:
    shell.report("runs/smoke")

    [check] = [command for command in BLOCKS if "Server OK" in command.text]

    assert re.fullmatch(r"Server OK: swaps=[1-9]\d*, status=ok\n", shell.run(check).stdout)


def test_an_agent_that_waited_prefills_only_what_is_new(shell: Shell) -> None:
    [agent] = [command for command in BLOCKS if "signal_phase" in command.text]

    # The three new tokens, and the last one generated before, whose KV was not needed yet.
    assert shell.result(agent).stdout == "prefilled 4 of 210 tokens\n"


@pytest.mark.parametrize("run", ["runs/smoke", "runs/hero", "runs/live"])
def test_all_agents_of_a_run_succeed(shell: Shell, run: str) -> None:
    report = shell.report(run)

    assert report["errors"] == []
    assert report["aggregates"]["success_count"] == AGENTS


def test_the_seeds_bound_on_swaps_holds(shell: Shell) -> None:
    checks = {check["name"]: check["verdict"] for check in shell.report("runs/hero")["checks"]}

    assert checks["swaps_gt"] == "pass"
    assert checks.keys() >= {"p99_wake_latency_ms", "p99_request_latency_ms", "success_count"}


def test_full_pools_cost_kv_and_no_agent(shell: Shell) -> None:
    results = shell.report("runs/live")["aggregates"]

    assert results["peak_live_agents"] == results["success_count"] == AGENTS
    assert results["drops"] > 0


def test_the_report_has_the_seeds_metrics(shell: Shell) -> None:
    report = shell.report("runs/smoke")
    section = DOCUMENT.partition("## Metrics")[2].partition("\n## ")[0]
    words = {
        word
        for row in re.findall(r"^\|(.*)\|$", section, re.MULTILINE)
        for word in re.findall(r"`(\w+)`", row)
    }
    here = report["aggregates"].keys() | report["agents"][0].keys()

    assert words - here - {"status"} == set()


def test_verify_finds_the_same_logits_and_tokens(shell: Shell) -> None:
    shell.result(maker_of("correctness_results.json"))
    result = json.loads((shell.folder / "correctness_results.json").read_text())

    assert result["passed"] is True
    assert all(prompt["loaded_blocks"] > 0 for prompt in result["prompts"])
