"""A comparison as a picture: what share of wakes and of requests took at most how long."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

from loadgen.errors import LoadgenError, RunFileError
from loadgen.metrics import wake_latency_ms
from loadgen.record import Record, RequestRecord


def check_available() -> None:
    """Checks that figures can be drawn.

    Raises:
        LoadgenError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise LoadgenError(
            "a figure needs matplotlib: pip install 'djinn-serving[plots]', or --no-figure"
        )


def shares(values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Returns values in rising order, and the share of all that is at most each of them."""
    ordered = sorted(values)
    return ordered, [(rank + 1) / len(ordered) for rank in range(len(ordered))]


def draw(title: str, runs: Mapping[str, Sequence[Record]], path: Path) -> None:
    """Draws a comparison.

    Args:
        title: Above it.
        runs: Each system's raw events, by its name.
        path: The file to write; its suffix chooses the format, such as ``.svg`` or ``.png``.

    Raises:
        RunFileError: The file cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(9.0, 4.2), layout="constrained")
    figure.suptitle(title)
    wakes, requests = figure.subplots(1, 2, sharey=True)
    wakes.set_ylabel("share")
    for axes, what in ((wakes, "wake"), (requests, "request")):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(f"{what} latency, milliseconds")
        axes.grid(visible=True, alpha=0.25)
        axes.set_ylim(0.0, 1.0)
    for name, records in runs.items():
        good = [r for r in records if isinstance(r, RequestRecord) and r.failure is None]
        woken = [latency for r in good if (latency := wake_latency_ms(r)) is not None]
        took = [(r.end_s - r.scheduled_s) * 1e3 for r in good]
        for axes, values in ((wakes, woken), (requests, took)):
            if values:
                axes.step(*shares(values), where="post", label=name)
    lines, names = requests.get_legend_handles_labels()
    if lines:
        figure.legend(lines, names, loc="outside lower center", ncols=len(names))
    try:
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    except OSError as error:
        raise RunFileError(f"{path}: {error.strerror}") from None
