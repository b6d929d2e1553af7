"""The policy of one reservation for each agent, as one serverless replica per agent gives."""

from __future__ import annotations

import math
from typing import ClassVar

from services.scheduler.domain import WorkerMode
from services.scheduler.policy.base import Policy
from services.scheduler.policy.room import Room
from services.scheduler.policy.view import WorkerView


class Static(Policy):
    """Reserves device blocks for the longest context of each session; those beyond wait.

    What is reserved is never evicted for want of room, because all reservations fit at once, and
    nothing is shared. A session gives its place up when it closes.
    """

    name: ClassVar[str] = "static"
    heeds: ClassVar[frozenset[str]] = frozenset({"reserve_tokens"})
    worker_mode: ClassVar[WorkerMode] = WorkerMode(
        write_through=False, offload=False, share_prefixes=False
    )

    def room(self, worker: WorkerView) -> Room:
        """Returns how many more reservations fit."""
        tokens = self._options.reserve_tokens or worker.max_context_length
        if not tokens or not worker.block_size_tokens:
            return Room(0, 0, reason="its longest context is not known")
        blocks = math.ceil(tokens / worker.block_size_tokens)
        places = worker.device.total // blocks
        reason = f"{worker.sessions} of {places} reservations of {tokens} tokens are taken"
        return Room(max(0, places - worker.sessions), reason=reason)
