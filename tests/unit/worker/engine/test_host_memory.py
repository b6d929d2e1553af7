"""Limits, read from files as the kernel writes them."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from services.worker.engine import host_memory
from services.worker.engine.host_memory import (
    available_bytes,
    memory_limit_bytes,
    raise_lock_limit,
)

GIB = 1 << 30


class Machine:
    """A folder that looks like a machine's root; 32 GiB of memory, 20 of them available."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("proc/meminfo", f"MemTotal: {32 << 20} kB\nMemAvailable: {20 << 20} kB\n")

    def write(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_without_control_groups_it_is_the_machine_s_memory(machine: Machine) -> None:
    assert memory_limit_bytes(machine.root) == 32 * GIB
    assert available_bytes(machine.root) == 20 * GIB


def test_a_limit_above_the_memory_of_now_counts(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "0::/a/b\n")
    machine.write("sys/fs/cgroup/a/b/memory.max", f"{128 * GIB}\n")
    assert memory_limit_bytes(machine.root) == 128 * GIB


def test_the_least_limit_on_the_way_up_counts(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "0::/a/b\n")
    machine.write("sys/fs/cgroup/a/b/memory.max", f"{128 * GIB}\n")
    machine.write("sys/fs/cgroup/a/memory.max", f"{8 * GIB}\n")
    machine.write("sys/fs/cgroup/memory.max", "max\n")
    assert memory_limit_bytes(machine.root) == 8 * GIB


def test_no_limit_leaves_the_machine_s_memory(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "0::/\n")
    machine.write("sys/fs/cgroup/memory.max", "max\n")
    assert memory_limit_bytes(machine.root) == 32 * GIB


@pytest.mark.parametrize(
    ("text", "limit"), [(str(6 * GIB), 6 * GIB), (str((1 << 63) - 4096), 32 * GIB)]
)
def test_control_groups_of_version_1_count(machine: Machine, text: str, limit: int) -> None:
    machine.write("proc/self/cgroup", "9:cpu,cpuacct:/x\n4:memory:/docker/host-only\n")
    machine.write("sys/fs/cgroup/memory/memory.limit_in_bytes", text)
    assert memory_limit_bytes(machine.root) == limit


class Limits:
    """`RLIMIT_MEMLOCK` of a process."""

    def __init__(self, soft: int, hard: int) -> None:
        self.now = (soft, hard)

    def get(self, _which: int) -> tuple[int, int]:
        return self.now

    def set(self, _which: int, limits: tuple[int, int]) -> None:
        self.now = limits


@pytest.mark.parametrize(
    ("soft", "hard", "capable", "after", "short"),
    [
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, False, resource.RLIM_INFINITY, None),
        (10, 10, True, 10, None),
        (100, 200, False, 100, None),
        (10, 200, False, 100, None),
        (10, resource.RLIM_INFINITY, False, 100, None),
        (10, 50, False, 50, 50),
    ],
    ids=["unlimited", "privileged", "enough", "raised", "raised under no limit", "short"],
)
def test_the_lock_limit_is_raised_as_far_as_it_can_be(
    monkeypatch: pytest.MonkeyPatch,
    soft: int,
    hard: int,
    capable: bool,
    after: int,
    short: int | None,
) -> None:
    limits = Limits(soft, hard)
    monkeypatch.setattr(resource, "getrlimit", limits.get)
    monkeypatch.setattr(resource, "setrlimit", limits.set)
    monkeypatch.setattr(host_memory, "_may_lock_all", lambda: capable)
    assert raise_lock_limit(100) == short
    assert limits.now == (after, hard)
