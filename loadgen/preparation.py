"""What a run needs before it begins: client processes, a folder, and a model that can serve it."""

from __future__ import annotations

import datetime as dt
import os
import re
from pathlib import Path

from loadgen import replay, shapes
from loadgen.config import Prompts, Workload
from loadgen.errors import LoadgenError, RunFileError
from loadgen.record import REQUESTS_FILE
from loadgen.targets.base import TargetInfo

AGENTS_PER_PROCESS = 32
SERVER_CORES = 4


def default_processes(agents: int) -> int:
    """Returns a number of client processes that leaves the server four cores, or half of fewer.

    Tokens of one step reach all agents at once, so more processes mean that each token waits for
    fewer others on its event loop.
    """
    cores = len(os.sched_getaffinity(0))
    return max(1, min(-(-agents // AGENTS_PER_PROCESS), max(cores - SERVER_CORES, cores // 2)))


def run_folder(name: str, out: Path | None) -> Path:
    """Makes and returns a run's folder.

    Args:
        name: The experiment's name.
        out: The folder; None: one of this moment under ``runs``.

    Raises:
        RunFileError: It cannot be made, or holds a run already.
    """
    if out is None:
        moment = dt.datetime.now(dt.UTC).strftime("%Y%m%dT%H%M%SZ")
        out = Path("runs") / f"{moment}-{re.sub(r'[^A-Za-z0-9._-]+', '-', name) or 'run'}"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFileError(f"{out}: {error.strerror}") from None
    if (out / REQUESTS_FILE).exists():
        raise RunFileError(f"{out}: holds a run already")
    return out


def check_fits(workload: Workload, info: TargetInfo, origin: str) -> None:
    """Checks that the model can serve the workload.

    Raises:
        LoadgenError: It cannot; the message names the setting, its value and the limit.
    """
    model = info.model.get("model", "the model")
    if workload.prompts is Prompts.STORIES:
        if not info.has_chat:
            raise LoadgenError(
                f"{origin}: workload.prompts: stories needs a chat template, and {model} has none"
            )
        return
    if not info.max_context_length:
        return
    if workload.replay:
        agent = max(replay.read(Path(workload.replay)), key=lambda agent: agent.context_tokens)
        if agent.context_tokens > info.max_context_length:
            raise LoadgenError(
                f"{workload.replay}: session {agent.name} grows to {agent.context_tokens} tokens, "
                f"and the limit of {model} is {info.max_context_length}"
            )
        return
    needed = shapes.most_tokens(workload)
    if needed > info.max_context_length:
        raise LoadgenError(
            f"{origin}: agents grow to {needed} tokens (context_length + iterations * tool_tokens "
            f"+ (iterations + 1) * new_tokens, at most context_limit), and the limit of {model} is "
            f"{info.max_context_length}"
        )
