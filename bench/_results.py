"""What all benchmarks' output has in common: tables, and files that say what they were made on."""

from __future__ import annotations

import argparse
import datetime as dt
import importlib.metadata
import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loadgen import environment

_PACKAGES = (
    "torch",
    "transformers",
    "triton",
    "flashinfer-python",
    "cuda-bindings",
)


def add_json_flag(parser: argparse.ArgumentParser) -> None:
    """Adds ``--json``, which `write` takes its path from."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the result")


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table whose columns are as wide as they must be.

    Args:
        header: The columns' names.
        rows: Cells as they shall be printed; the first column is a name, the others are numbers.
    """
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        name, *numbers = line
        cells = [name.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=True)]
        print("  ".join(cells).rstrip())


def write(args: argparse.Namespace, benchmark: str, device: str, body: Mapping[str, Any]) -> None:
    """Writes a result to the file that ``--json`` names, if it names one.

    Args:
        args: The benchmark's arguments, which are written down too.
        benchmark: Its name.
        device: ``cpu``, ``cuda`` or ``cuda:<index>``: what it ran on.
        body: What was measured, fit for JSON.
    """
    if args.json is None:
        return
    result = {
        "benchmark": benchmark,
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "commit": environment.git_commit(),
        "settings": {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(args).items()
            if name != "json"
        },
        "machine": {**environment.machine(), **_gpu(device)},
        "versions": versions(),
        **body,
    }
    args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that a figure may depend on."""
    found = environment.versions()
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _gpu(device: str) -> dict[str, str]:
    """Returns what the driver calls the GPU, without loading torch; nothing for a CPU."""
    if not device.startswith("cuda"):
        return {}
    index = device.partition(":")[2] or "0"
    asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(
            [*asked, f"--id={index}"],
            capture_output=True,
            check=True,
            text=True,
            timeout=30,
        )
    except (OSError, subprocess.SubprocessError):
        return {"gpu": device}
    name, _, driver = said.stdout.strip().partition(", ")
    return {"gpu": name, "driver": driver}
