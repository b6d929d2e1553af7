"""How much agents that decode notice of others: time between their tokens, alone and beside them.

    python -m bench interference --model dummy:llama-2-7b --device cuda --json interference.json

Agents decode against a djinn-server, in rounds: alone; while other sessions are evicted and
restored as fast as the worker does it, in both directions at once; and while new agents arrive with
their prompts. Each round begins with the same contexts, the kinds of rounds take turns, and the
agents' clients run in processes of their own.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import djinn_client as djinn
from bench import _disturbers, _floors, _results, _server
from bench._decoders import DecoderError, Decoders, Job, Measured
from bench._disturbers import Done, Movers
from bench._floors import ModelShape
from bench._server import Pools
from loadgen.errors import LoadgenError
from loadgen.metrics import distribution
from services.common.errors import ConfigError

ALONE = "alone"
MOVING = "evictions and restores"
ARRIVING = "new prompts"


@dataclass(slots=True)
class Rounds:
    """All rounds of one kind."""

    measured: list[Measured] = field(default_factory=list)
    done: list[Done] = field(default_factory=list)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench interference", description=__doc__)
    _server.add_server_flags(parser)
    parser.add_argument("--agents", type=int, default=32, help="that decode")
    parser.add_argument("--context", type=int, default=1000, help="tokens of each before a round")
    parser.add_argument("--tokens", type=int, default=200, help="each generates in a round")
    parser.add_argument("--rounds", type=int, default=3, help="of each kind")
    parser.add_argument("--processes", type=int, default=4, help="that the agents are spread over")
    parser.add_argument("--pairs", type=int, default=4, help="of sessions that move")
    parser.add_argument("--moved-context", type=int, default=1074, help="tokens of each of them")
    parser.add_argument("--prompts-per-s", type=float, default=10.0)
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    _results.add_json_flag(parser)
    return parser


def jobs(args: argparse.Namespace, server: str, vocab_size: int) -> list[Job]:
    """Returns what each process decodes: the agents, spread as evenly as may be."""
    count = min(args.processes, args.agents)
    shares = [len(range(index, args.agents, count)) for index in range(count)]
    return [Job(server, share, args.context, vocab_size, seed) for seed, share in enumerate(shares)]


async def run(args: argparse.Namespace, pools: Pools) -> dict[str, Rounds]:
    """Runs all rounds, after one of each kind that is not counted."""
    found: defaultdict[str, Rounds] = defaultdict(Rounds)
    async with (
        _server.running(args, pools) as endpoint,
        await djinn.connect(endpoint) as client,
    ):
        vocab_size = (await _server.worker_of(client)).model.vocab_size
        movers = Movers(client, args.pairs, args.moved_context, vocab_size)
        kinds: dict[str, Callable[[], contextlib.AbstractAsyncContextManager[Done]]] = {
            ALONE: _disturbers.nothing,
            MOVING: movers.moving,
            ARRIVING: lambda: _disturbers.arrivals(
                client, args.prompts_per_s, args.prompt_tokens, vocab_size
            ),
        }
        decoders = Decoders(jobs(args, endpoint, vocab_size))
        try:
            await decoders.wait_ready()
            await movers.open()
            for turn in range(args.rounds + 1):
                for kind, disturb in kinds.items():
                    async with disturb() as done:
                        measured = await decoders.run(args.tokens)
                    if turn:
                        found[kind].measured += measured
                        found[kind].done.append(done)
        finally:
            decoders.close()
    return found


def rows_of(found: dict[str, Rounds]) -> list[dict[str, Any]]:
    """Returns the table."""
    rows = []
    alone_p50 = alone_p99 = 0.0
    for kind, rounds in found.items():
        gaps = distribution(itertools.chain(*(one.gaps_ms for one in rounds.measured)))
        assert gaps.p50 is not None
        assert gaps.p99 is not None
        if kind == ALONE:
            alone_p50, alone_p99 = gaps.p50, gaps.p99
        seconds = sum(one.seconds for one in rounds.done)
        first = distribution(itertools.chain(*(one.first_token_ms for one in rounds.done)))
        rows.append(
            {
                "name": kind,
                "tokens": gaps.count,
                "p50_ms": gaps.p50,
                "p99_ms": gaps.p99,
                "max_ms": gaps.max,
                "p50_ratio": gaps.p50 / alone_p50,
                "ratio": gaps.p99 / alone_p99,
                "loaded_bytes_per_s": _rate(sum(d.loaded_bytes for d in rounds.done), seconds),
                "stored_bytes_per_s": _rate(sum(d.stored_bytes for d in rounds.done), seconds),
                "refused_evictions": sum(one.refused for one in rounds.done),
                "new_agents": first.count,
                "first_token_p50_ms": first.p50,
                "first_token_p99_ms": first.p99,
                "loop_lag_p99_ms": max(one.loop_lag_p99_ms for one in rounds.measured),
            }
        )
    return rows


def _rate(amount: float, seconds: float) -> float:
    return amount / seconds if seconds else 0.0


def _print(rows: Sequence[dict[str, Any]]) -> None:
    header = ("beside", "ITL p50 ms", "p99 ms", "max ms", "p50 ratio", "p99 ratio")
    _results.print_table(
        (*header, "GB/s in", "GB/s out", "prompts", "TTFT p50 ms", "p99 ms", "lag p99 ms"),
        [
            (
                row["name"],
                *(f"{row[key]:.2f}" for key in ("p50_ms", "p99_ms", "max_ms")),
                *(f"{row[key]:.3f}" for key in ("p50_ratio", "ratio")),
                *(f"{row[f'{way}_bytes_per_s'] / 1e9:.2f}" for way in ("loaded", "stored")),
                str(row["new_agents"]),
                *(_if_any(row[key]) for key in ("first_token_p50_ms", "first_token_p99_ms")),
                f"{row['loop_lag_p99_ms']:.2f}",
            )
            for row in rows
        ],
    )


def _if_any(number: float | None) -> str:
    return "" if number is None else f"{number:.1f}"


def _pools(args: argparse.Namespace, model: ModelShape) -> Pools:
    def needed(sessions: int, tokens: int) -> int:
        return _server.sessions_bytes(model, args.device, sessions, tokens)

    moved = needed(1, args.moved_context)
    arriving = needed(8, args.prompt_tokens + 1)
    decoding = needed(args.agents, args.context + args.tokens)
    # Some slack on the device, where a share is kept free; hardly any on the host: see `Movers`.
    device_bytes = round(1.2 * (decoding + 2 * args.pairs * moved + arriving))
    return Pools(device_bytes, (args.pairs + 1) * moved)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        model = _floors.model_shape(args.model, args.device, args.dtype)
        rows = rows_of(asyncio.run(run(args, _pools(args, model))))
    except (ConfigError, LoadgenError, DecoderError, djinn.DjinnError) as error:
        print(error, file=sys.stderr)
        return 2
    _print(rows)
    _results.write(args, "interference", args.device, {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
