"""What this machine gives at best, and the floors of a model's steps and restores that follow.

    python -m bench floors --model dummy:llama-2-7b --device cuda --json floors.json

Copies by size and layout go between pinned host memory and the device, one `copy_` per piece, the
pieces in random order; ratios are to one large copy in the same direction. `step` and `wake` take
the file with ``--floors``.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from bench import _floors, _results, _streams
from bench._floors import ModelShape, Speeds
from services.common.errors import ConfigError
from services.worker.engine.streams import Stream, Wakeup, Work

TO_DEVICE, TO_HOST = "to the device", "to the host"
# What takes a millisecond is timed so often in a row that launching and waiting do not count.
_REPEATS = 8


@dataclass(frozen=True, slots=True)
class CopyRow:
    """One line of the table of copies.

    Attributes:
        direction: Which way, and whether the other direction was busy too.
        piece_bytes: Bytes of one piece; all pieces together are always as many.
        bytes_per_s: In this direction.
        ratio: To one large copy in this direction.
    """

    direction: str
    piece_bytes: int
    bytes_per_s: float
    ratio: float


@dataclass(frozen=True, slots=True)
class FloorRow:
    """One line of the table of floors.

    Attributes:
        name: The step, or the restore.
        read_bytes: What must be read, or copied.
        flops: What must be multiplied.
        floor_ms: The least time.
        products_share: Time of the products over that of the bytes: above 1, products bound it.
    """

    name: str
    read_bytes: int
    flops: float
    floor_ms: float
    products_share: float


class CopyBench:
    """Two memories of the same size, and a stream for each direction.

    Args:
        size_bytes: Of each memory.
        device: One is there, the other on the host.
        rounds: Each figure is the median of this many.
    """

    def __init__(self, size_bytes: int, device: torch.device, rounds: int) -> None:
        on_gpu = device.type == "cuda"
        self.size_bytes = size_bytes
        self._rounds = rounds
        self._host = torch.ones(size_bytes, dtype=torch.uint8, pin_memory=on_gpu)
        self._back = torch.ones(size_bytes, dtype=torch.uint8, pin_memory=on_gpu)
        self._device = torch.ones(size_bytes, dtype=torch.uint8, device=device)
        self._other = torch.ones(size_bytes, dtype=torch.uint8, device=device)
        wakeup = Wakeup()
        self._load = _streams.make_stream("load", device, wakeup)
        self._store = _streams.make_stream("store", device, wakeup)

    def one_way(self, direction: str, piece_bytes: int) -> float:
        """Returns bytes per second of copies in one direction."""
        launch = self._launch(direction, piece_bytes)
        return self.size_bytes / _streams.median_seconds(self._rounds, [launch])

    def both_ways(self, piece_bytes: int) -> float:
        """Returns bytes per second in each direction, both busy at once."""
        launches = [self._launch(direction, piece_bytes) for direction in (TO_DEVICE, TO_HOST)]
        return self.size_bytes / _streams.median_seconds(self._rounds, launches)

    def close(self) -> None:
        """Ends the streams."""
        self._load.close()
        self._store.close()

    def _launch(self, direction: str, piece_bytes: int) -> tuple[Stream, Work]:
        if direction == TO_DEVICE:
            stream, target, source = self._load, self._device, self._host
        else:
            stream, target, source = self._store, self._back, self._other
        pairs = list(zip(target.split(piece_bytes), source.split(piece_bytes), strict=True))
        random.Random(0).shuffle(pairs)

        def copy() -> None:
            for there, here in pairs:
                there.copy_(here, non_blocking=True)

        return stream, copy


def measure_copies(bench: CopyBench, pieces_bytes: Sequence[int]) -> list[CopyRow]:
    """Returns the table of copies.

    Args:
        bench: Measures one.
        pieces_bytes: Sizes of pieces that large ones are compared with.
    """
    whole = {way: bench.one_way(way, bench.size_bytes) for way in (TO_DEVICE, TO_HOST)}
    rows = []
    for way, best in whole.items():
        rows.append(CopyRow(way, bench.size_bytes, best, 1.0))
        for piece in pieces_bytes:
            speed = bench.one_way(way, piece)
            rows.append(CopyRow(way, piece, speed, speed / best))
    for piece in (bench.size_bytes, pieces_bytes[0]):
        speed = bench.both_ways(piece)
        rows.append(CopyRow("both at once, each", piece, speed, speed / min(whole.values())))
    return rows


def measure_speeds(
    device: torch.device, dtype: torch.dtype, copy_bytes: int, rounds: int
) -> tuple[Speeds, list[CopyRow]]:
    """Measures the machine.

    Args:
        device: The device.
        dtype: Of the product's factors.
        copy_bytes: Size of the large copies.
        rounds: Each figure is the median of this many.

    Returns:
        Its speeds, and the table of copies.
    """
    bench = CopyBench(copy_bytes, device, rounds)
    pieces = [size for size in (8 << 20, 4 << 20, 1 << 20, 1 << 18) if size < copy_bytes]
    copies = measure_copies(bench, pieces or [max(1, copy_bytes // 4)])
    bench.close()
    whole = {row.direction: row.bytes_per_s for row in copies if row.piece_bytes == copy_bytes}
    return (
        Speeds(
            memory_bytes_per_s=_memory_speed(device, copy_bytes, rounds),
            product_flops=_product_speed(device, dtype, rounds),
            load_bytes_per_s=whole[TO_DEVICE],
            store_bytes_per_s=whole[TO_HOST],
        ),
        copies,
    )


def measure(device: torch.device, dtype: torch.dtype) -> Speeds:
    """Measures the machine's speeds alone, as `step` and others do that are given no file."""
    return measure_speeds(device, dtype, default_copy_bytes(device), rounds=8)[0]


def _memory_speed(device: torch.device, size_bytes: int, rounds: int) -> float:
    source = torch.ones(2 * size_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    stream = _streams.make_stream("compute", device, Wakeup())

    def copy() -> None:
        for _ in range(_REPEATS):
            target.copy_(source)

    spent = _streams.median_seconds(rounds, [(stream, copy)])
    stream.close()
    return _REPEATS * 2 * source.numel() / spent


def _product_speed(device: torch.device, dtype: torch.dtype, rounds: int) -> float:
    width = 8192 if device.type == "cuda" else 512
    left, right = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    stream = _streams.make_stream("compute", device, Wakeup())

    def multiply() -> None:
        for _ in range(_REPEATS):
            torch.mm(left, right, out=product)

    spent = _streams.median_seconds(rounds, [(stream, multiply)])
    stream.close()
    return _REPEATS * 2.0 * width**3 / spent


def default_copy_bytes(device: torch.device, wanted_mib: float | None = None) -> int:
    """Returns the size of a large copy: what is wanted, or one that runs at full speed."""
    if wanted_mib is not None:
        return max(4, int(wanted_mib * 2**20))
    return (1 << 30) if device.type == "cuda" else (32 << 20)


def floors_of(
    model: ModelShape, speeds: Speeds, batches: Sequence[int], context: int
) -> list[FloorRow]:
    """Returns the table of a model's floors.

    Args:
        model: Its shape.
        speeds: The machine's.
        batches: Of the decodes.
        context: Tokens before each decode.
    """
    rows = []
    for step in _floors.default_steps(batches, context):
        parts = step.parts()
        read, flops = _floors.step_bytes(model, parts), _floors.step_flops(model, parts)
        share = (flops / speeds.product_flops) / (read / speeds.memory_bytes_per_s)
        floor_s = _floors.step_floor_s(model, parts, speeds)
        rows.append(FloorRow(step.name, read, flops, floor_s * 1e3, share))
    known = max(context - 26, 1)
    restore_ms = _floors.restore_floor_s(model, known, speeds) * 1e3
    rows.append(FloorRow(f"restore {known}", known * model.token_bytes, 0.0, restore_ms, 0.0))
    return rows


def print_tables(speeds: Speeds, copies: Sequence[CopyRow], floors: Sequence[FloorRow]) -> None:
    """Prints both tables and the speeds between them."""
    _results.print_table(
        ("copies", "piece MiB", "GB/s", "ratio"),
        [
            (
                row.direction,
                f"{row.piece_bytes / 2**20:g}",
                f"{row.bytes_per_s / 1e9:.2f}",
                f"{row.ratio:.3f}",
            )
            for row in copies
        ],
    )
    print(
        f"\ndevice memory {speeds.memory_bytes_per_s / 1e12:.4g} TB/s, products"
        f" {speeds.product_flops / 1e12:.4g} TFLOP/s\n"
    )
    _results.print_table(
        ("floors", "GB", "TFLOP", "floor ms", "products/bytes ratio"),
        [
            (
                row.name,
                f"{row.read_bytes / 1e9:.3f}",
                f"{row.flops / 1e12:.3f}",
                f"{row.floor_ms:.3f}",
                f"{row.products_share:.2f}",
            )
            for row in floors
        ],
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench floors", description=__doc__)
    parser.add_argument("--model", default="dummy:tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--context", type=int, default=1100)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument(
        "--copy-mib", type=float, help="size of the large copies; 1,024 on a GPU, 32 on a CPU"
    )
    _results.add_json_flag(parser)
    args = parser.parse_args(argv)
    try:
        model = _floors.model_shape(args.model, args.device, args.dtype)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    device = torch.device(args.device)
    copy_bytes = default_copy_bytes(device, args.copy_mib)
    speeds, copies = measure_speeds(device, model.dtype, copy_bytes, args.rounds)
    floors = floors_of(model, speeds, args.batch, args.context)
    print_tables(speeds, copies, floors)
    body = {
        "speeds": asdict(speeds),
        "copies": [asdict(row) for row in copies],
        "floors": [asdict(row) for row in floors],
    }
    _results.write(args, "floors", args.device, body)
    return 0


if __name__ == "__main__":
    sys.exit(main())
