"""``djinn-scheduler explain SESSION``: why a session's KV is where it is."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

import grpc

from djinn.v1 import admin_service_pb2 as pb
from djinn.v1 import admin_service_pb2_grpc as pb_grpc
from djinn.v1 import types_pb2
from services.common import flags
from services.common.status import error_from_rpc

NAME = "explain"

_TIMEOUT_S = 10.0


def parser() -> argparse.ArgumentParser:
    """Returns the subcommand's parser."""
    made = flags.Parser(
        f"djinn-scheduler {NAME}",
        "Asks a running scheduler why a session's KV is where it is: when it is expected to wake, "
        "and what it would cost to keep, to evict and to drop it.",
    )
    made.add_argument("session_id", metavar="SESSION", help="the session's id")
    made.add_argument(
        "--address",
        type=flags.host_port,
        default="127.0.0.1:5556",
        metavar="HOST:PORT",
        help="where the scheduler listens",
    )
    return made


def main(argv: Sequence[str]) -> int:
    """Runs the subcommand and returns its exit code."""
    args = parser().parse_args(argv)
    request = pb.ExplainSessionRequest(session_id=args.session_id)
    with grpc.insecure_channel(args.address) as channel:
        try:
            answer = pb_grpc.AdminServiceStub(channel).ExplainSession(request, timeout=_TIMEOUT_S)
        except grpc.RpcError as error:
            known = error_from_rpc(error)
            message = known.message if known is not None else f"{args.address}: {error}"
            print(f"djinn-scheduler {NAME}: {' '.join(message.split())}", file=sys.stderr)
            return 1
    for line in lines(answer):
        print(line)
    return 0


def lines(answer: pb.ExplainSessionResponse) -> Iterator[str]:
    """Yields the explanation, line by line."""
    session = answer.session
    kv = session.kv
    phase = types_pb2.AgentPhase.Name(session.phase).removeprefix("AGENT_PHASE_")
    tool = f" for {session.tool_name}" if session.tool_name else ""
    yield f"session   {session.session_id}, {phase}{tool}, on {session.worker_id or 'no worker'}"
    yield (
        f"kv        {session.context_length} tokens, {kv.total_blocks} blocks: "
        f"{kv.device_blocks} on the device{'' if kv.resident else ' (may be reused)'}, "
        f"{kv.host_blocks} on the host, {kv.missing_tokens} tokens without"
    )
    yield f"policy    {answer.policy}: {answer.reason or 'was not asked yet'}"
    if not answer.HasField("costs"):
        yield "costs     none: this policy weighs nothing, or no worker holds the session"
        return
    wait, costs = answer.forecast, answer.costs
    yield (
        f"wait      {wait.waited_seconds:.3f} s until now, {wait.remaining_seconds:.3f} s more on "
        f"average (by {wait.source or 'nothing but the time waited'}); the middle one of those "
        f"away {costs.middle_seconds:.3f} s"
    )
    yield (
        f"wakes in  {wait.early_seconds:.3f} s (1 in 10), {wait.median_seconds:.3f} s (half), "
        f"{wait.late_seconds:.3f} s (9 in 10)"
    )
    assumed = "" if costs.measured else " (a speed is assumed: nothing measured yet)"
    yield (
        f"work      {costs.load_seconds:.4f} s to load, {costs.prefill_seconds:.4f} s to "
        f"compute{assumed}"
    )
    yield (
        f"pressure  device {costs.device_pressure:.2f}, host {costs.host_pressure:.2f} "
        "(0: there is room, 1: none)"
    )
    choices = (
        ("keep", pb.KV_CHOICE_KEEP, costs.keep_seconds),
        ("evict", pb.KV_CHOICE_EVICT, costs.evict_seconds),
        ("drop", pb.KV_CHOICE_DROP, costs.drop_seconds),
    )
    for name, choice, cost in choices:
        best = "  <- costs least" if choice == costs.best else ""
        yield f"{name:9} {cost:.4f} s of delay{best}"
