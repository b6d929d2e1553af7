"""The policy of engines that know nothing of phases and have no host tier."""

from __future__ import annotations

from typing import ClassVar

from services.scheduler.domain import WorkerMode
from services.scheduler.policy.base import Policy


class ReactiveRecompute(Policy):
    """Commands nothing: under pressure the worker forgets what was least recently used.

    This is what vLLM does without offload: what it preempts or reuses is computed again.
    """

    name: ClassVar[str] = "reactive-recompute"
    worker_mode: ClassVar[WorkerMode] = WorkerMode(write_through=False, offload=False)
