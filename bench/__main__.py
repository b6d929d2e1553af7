"""``python -m bench NAME ...``: runs one benchmark; each prints a table and can write JSON."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

_NOT_BENCHMARKS = {"__init__", "__main__", "vllm_decode"}


def names() -> list[str]:
    """Returns the benchmarks there are."""
    found = {path.stem for path in Path(__file__).parent.glob("*.py")}
    return sorted(name for name in found - _NOT_BENCHMARKS if not name.startswith("_"))


def main(argv: list[str]) -> int:
    """Runs the benchmark that the first argument names; returns the exit code."""
    if not argv or argv[0] not in names():
        print("usage: python -m bench NAME [options]; NAME is one of: " + ", ".join(names()))
        return 2
    code: int = importlib.import_module(f"bench.{argv[0]}").main(argv[1:])
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
