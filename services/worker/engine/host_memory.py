"""How much memory this process may use and lock, as the kernel says."""

from __future__ import annotations

import os
import resource
from pathlib import Path

_CAP_IPC_LOCK = 1 << 14


def memory_limit_bytes(root: Path = Path("/")) -> int:
    """Returns the most memory this process may use.

    That is the least limit of its control groups, version 2 or 1, or without any the machine's
    memory. A limit may be above what the machine has at the moment: a virtual machine's memory can
    start small and grow as it is used.

    Args:
        root: Where ``proc`` and ``sys`` are.
    """
    limits = [limit for path in _limit_files(root) if (limit := _limit(path)) is not None]
    return min(limits) if limits else _physical_bytes(root)


def available_bytes(root: Path = Path("/")) -> int:
    """Returns how much memory can be had now without pushing anything out.

    Args:
        root: Where ``proc`` is.
    """
    return _meminfo_bytes(root, "MemAvailable")


def raise_lock_limit(size_bytes: int) -> int | None:
    """Raises the soft limit of locked memory as far as `size_bytes` needs and the hard one allows.

    Returns:
        The limit, if it is still less and this process is bound by it; else None.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = resource.RLIM_INFINITY
    if soft == unlimited or soft >= size_bytes or _may_lock_all():
        return None
    wanted = size_bytes if hard == unlimited else min(size_bytes, hard)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (wanted, hard))
    return wanted if wanted < size_bytes else None


def _may_lock_all(root: Path = Path("/")) -> bool:
    for line in (root / "proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "CapEff":
            return bool(int(value, 16) & _CAP_IPC_LOCK)
    return False


def _physical_bytes(root: Path) -> int:
    return _meminfo_bytes(root, "MemTotal")


def _meminfo_bytes(root: Path, field: str) -> int:
    for line in (root / "proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _limit_files(root: Path) -> list[Path]:
    """Returns the files with limits of this process's control group and of those it is in."""
    files = []
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount, name = (
            ("sys/fs/cgroup/memory", "memory.limit_in_bytes")
            if controllers
            else ("sys/fs/cgroup", "memory.max")
        )
        # Inside a container the path may be the host's, of which only the end is seen here.
        parts = Path(path.lstrip("/")).parts
        files += [root / mount / Path(*parts[:count]) / name for count in range(len(parts), -1, -1)]
    return files


def _limit(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    # Version 1 says "none" by a number near the largest there is.
    return None if text == "max" or int(text) >= 1 << 62 else int(text)
