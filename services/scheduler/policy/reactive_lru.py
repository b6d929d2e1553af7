"""The policy of engines that know nothing of phases and have a host tier."""

from __future__ import annotations

from typing import ClassVar

from services.scheduler.domain import WorkerMode
from services.scheduler.policy.base import Policy


class ReactiveLru(Policy):
    """Commands nothing: under pressure the worker evicts what was least recently used.

    This is what vLLM with its native offload and LMCache do. The worker copies to the host when it
    evicts and not before.
    """

    name: ClassVar[str] = "reactive-lru"
    worker_mode: ClassVar[WorkerMode] = WorkerMode(write_through=False)
