"""One session's KV to the host and back through the worker's own copy engine, beside plain copies.

    python -m bench transfer --model dummy:llama-2-7b --device cuda --json transfer.json

A restore is timed twice: from the call that holds the session to the poll that finds its last load
done, bookkeeping included, and from the first byte copied to the last; an evict likewise. No two of
a session's blocks adjoin in either pool. Ratios are to one large copy between pinned memory and the
device, taken in turns with them: in the same direction, or, where both are busy at once, to two.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from bench import _floors, _results
from bench._floors import ModelShape
from bench._kv_bench import KvBench, Moved
from bench.floors import TO_DEVICE, TO_HOST, CopyBench, default_copy_bytes
from services.common.errors import ConfigError
from services.worker.engine.sequence import Session
from services.worker.engine.transfer import Priority

PLAIN_LOAD = "one large copy to the device"
PLAIN_STORE = "one large copy to the host"
PLAIN_BOTH = "large copies both ways, each"
RESTORE = "restore of one session"
EVICT = "evict of one session"
BOTH = "restore and evict at once, each"
CLEAN = "evict of a clean session"
_BESIDE = {
    PLAIN_LOAD: PLAIN_LOAD,
    RESTORE: PLAIN_LOAD,
    PLAIN_STORE: PLAIN_STORE,
    EVICT: PLAIN_STORE,
    PLAIN_BOTH: PLAIN_BOTH,
    BOTH: PLAIN_BOTH,
}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: medians.

    Attributes:
        name: What was done.
        moved_bytes: In one direction.
        ms: How long it took, bookkeeping included.
        copy_ms: From the first byte to the last, of the slower direction.
        bytes_per_s: In one direction, by `copy_ms`.
        ratio: ``ms`` as speed over that of the plain copy; of a clean session's eviction, bytes
            moved over the session's.
        copy_ratio: ``copy_ms`` as speed over that of the plain copy; None of a clean session's.
    """

    name: str
    moved_bytes: int
    ms: float
    copy_ms: float
    bytes_per_s: float
    ratio: float
    copy_ratio: float | None


class TransferBench:
    """Moves one session's KV, or two sessions' in opposite directions, time and again.

    Args:
        model: Whose KV.
        tokens: Of a session.
        device: Where the device pool is.
    """

    def __init__(self, model: ModelShape, tokens: int, device: torch.device) -> None:
        layout = model.chosen_layout(device.type)
        blocks = -(-tokens // layout.block_size_tokens)
        self.session_bytes = blocks * layout.block_bytes
        self._tokens = tokens
        self._block_size_tokens = layout.block_size_tokens
        self._kv = KvBench(layout, 2 * blocks, device)

    def evict_and_restore(self) -> tuple[Moved, Moved]:
        """Evicts a session that has nothing on the host, and then has it come back."""
        session = self._kv.session("one", self._tokens)
        evict = self._kv.move(lambda: self._evict(session))
        self._release(session)
        restore = self._kv.move(lambda: self._restore(session))
        self._kv.mover.forget(session)
        return evict, restore

    def both_at_once(self) -> Moved:
        """Restores one session while another one is evicted."""
        away, here = (self._kv.session(name, self._tokens) for name in ("away", "here"))
        self._kv.move(lambda: self._evict(away))
        self._release(away)
        moved = self._kv.move(lambda: self._restore(away), lambda: self._evict(here))
        self._kv.mover.forget(away)
        self._kv.mover.forget(here)
        return moved

    def evict_clean(self) -> tuple[Moved, int]:
        """Evicts a session whose full blocks were stored before.

        Returns:
            How long it took, and the bytes that this moved.
        """
        full = self._tokens // self._block_size_tokens * self._block_size_tokens
        session = self._kv.session("clean", 0)
        self._kv.write_through(session, full)
        self._kv.fill(session, self._tokens)
        before = self._kv.mover.counters.stored_bytes
        moved = self._kv.move(lambda: self._evict(session))
        moved_bytes = self._kv.mover.counters.stored_bytes - before
        self._kv.mover.forget(session)
        return moved, moved_bytes

    def close(self) -> None:
        """Gives the memory back."""
        self._kv.close()

    def _evict(self, session: Session) -> None:
        self._kv.mover.evict(session)

    def _release(self, session: Session) -> None:
        """Frees an evicted session's device blocks, so that nothing of it is found there."""
        freed = self._kv.mover.blocks.release_device(session.kv)
        assert len(freed) == len(session.kv.blocks)

    def _restore(self, session: Session) -> None:
        held = self._kv.mover.hold(session, Priority.WAKE)
        assert held


def measure(bench: TransferBench, plain: CopyBench, rounds: int) -> list[Row]:
    """Returns the table.

    Args:
        bench: Moves sessions.
        plain: Copies as many bytes in one piece.
        rounds: All take turns this often, after one round that is not counted.
    """
    times: defaultdict[str, list[Moved]] = defaultdict(list)
    moved = dict.fromkeys((PLAIN_LOAD, PLAIN_STORE, PLAIN_BOTH), plain.size_bytes)
    moved |= dict.fromkeys((RESTORE, EVICT, BOTH), bench.session_bytes)
    for _ in range(rounds + 1):
        for name, way in ((PLAIN_LOAD, TO_DEVICE), (PLAIN_STORE, TO_HOST)):
            times[name].append(_plain(plain, plain.one_way(way, plain.size_bytes)))
        evict, restore = bench.evict_and_restore()
        times[RESTORE].append(restore)
        times[EVICT].append(evict)
        times[PLAIN_BOTH].append(_plain(plain, plain.both_ways(plain.size_bytes)))
        times[BOTH].append(bench.both_at_once())
        clean, moved[CLEAN] = bench.evict_clean()
        times[CLEAN].append(clean)
    whole_s = {name: statistics.median(m.seconds for m in took[1:]) for name, took in times.items()}
    copy_s = {
        name: statistics.median(m.copy_seconds for m in took[1:]) for name, took in times.items()
    }
    rows = []
    for name in (*_BESIDE, CLEAN):
        ratio, copy_ratio = moved[name] / bench.session_bytes, None
        if name in _BESIDE:
            best = moved[_BESIDE[name]] / whole_s[_BESIDE[name]]
            ratio = moved[name] / whole_s[name] / best
            copy_ratio = moved[name] / copy_s[name] / best
        rows.append(
            Row(
                name=name,
                moved_bytes=moved[name],
                ms=whole_s[name] * 1e3,
                copy_ms=copy_s[name] * 1e3,
                bytes_per_s=moved[name] / copy_s[name],
                ratio=ratio,
                copy_ratio=copy_ratio,
            )
        )
    return rows


def _plain(plain: CopyBench, bytes_per_s: float) -> Moved:
    spent = plain.size_bytes / bytes_per_s
    return Moved(spent, spent)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench transfer", description=__doc__)
    parser.add_argument("--model", default="dummy:tiny", help="whose KV")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tokens", type=int, default=1074, help="of a session")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument(
        "--copy-mib", type=float, help="size of the large copies; 1,024 on a GPU, 32 on a CPU"
    )
    _results.add_json_flag(parser)
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    try:
        model = _floors.model_shape(args.model, args.device, args.dtype)
        bench = TransferBench(model, args.tokens, device)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    copy_bytes = default_copy_bytes(device, args.copy_mib)
    plain = CopyBench(copy_bytes, device, rounds=1)
    rows = measure(bench, plain, args.rounds)
    plain.close()
    bench.close()
    _results.print_table(
        ("what", "MB", "ms", "ratio", "copy ms", "GB/s", "copy ratio"),
        [
            (
                row.name,
                f"{row.moved_bytes / 1e6:.1f}",
                f"{row.ms:.3f}",
                f"{row.ratio:.3f}",
                f"{row.copy_ms:.3f}",
                f"{row.bytes_per_s / 1e9:.2f}",
                "" if row.copy_ratio is None else f"{row.copy_ratio:.3f}",
            )
            for row in rows
        ],
    )
    _results.write(args, "transfer", args.device, {"rows": [asdict(row) for row in rows]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
