"""Products of few rows on this CPU: torch's `linear` beside the same product turned round."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from bench import _results
from services.worker.engine.models.few_rows import FewRows

# Output and input features of SmolLM2's layers.
SHAPES = [(1536, 576), (576, 1536), (576, 576), (192, 576)]
COPIES = 40


def measure(count: int, out: int, width: int, repeats: int) -> tuple[float, float]:
    """Returns the best time in microseconds of torch's product and of the turned one.

    The two take turns, so that whatever else runs on the machine slows both.
    """
    # Many copies, so that weights come from memory as they do in a model.
    layers = [nn.Linear(width, out, bias=False) for _ in range(COPIES)]
    x = torch.randn(count, width)
    few_rows = FewRows(nn.ModuleList(layers))
    plain = turned = float("inf")
    with torch.inference_mode():
        for index in range(repeats):
            layer = layers[index % COPIES]
            start = time.perf_counter()
            F.linear(x, layer.weight)
            plain = min(plain, time.perf_counter() - start)
            with few_rows.switched_on():
                start = time.perf_counter()
                layer(x)
                turned = min(turned, time.perf_counter() - start)
    return plain * 1e6, turned * 1e6


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench few_rows", description=__doc__)
    parser.add_argument("--threads", type=int, help="default: torch's choice")
    parser.add_argument("--repeats", type=int, default=200)
    _results.add_json_flag(parser)
    args = parser.parse_args(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    rows = []
    for count in (1, 4, 8, 16, 32, 64):
        for out, width in SHAPES:
            plain, turned = measure(count, out, width, args.repeats)
            rows.append(
                {"rows": count, "out": out, "in": width, "linear_us": plain, "turned_us": turned}
            )
    _results.print_table(
        ("out x in", "rows", "linear us", "turned us", "ratio"),
        [
            (
                f"{row['out']} x {row['in']}",
                str(row["rows"]),
                f"{row['linear_us']:.0f}",
                f"{row['turned_us']:.0f}",
                f"{row['linear_us'] / row['turned_us']:.2f}",
            )
            for row in rows
        ],
    )
    _results.write(args, "few_rows", "cpu", {"threads": torch.get_num_threads(), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
