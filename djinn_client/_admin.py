"""What operators and verification tools call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from djinn.v1 import admin_service_pb2
from djinn_client import _convert
from djinn_client._types import CommandOutcome, EvictMode, Stats, WorkerInfo

if TYPE_CHECKING:
    from djinn_client._core import Core


class Admin:
    """The scheduler's AdminService; `Client.admin` is one.

    All methods raise `DjinnError` when the call, or the worker's command, fails.
    """

    def __init__(self, core: Core) -> None:
        self._core = core

    async def workers(self) -> list[WorkerInfo]:
        """Returns the connected workers, in order of their ids."""
        answer = await self._core.read(
            self._core.admin.ListWorkers, admin_service_pb2.ListWorkersRequest()
        )
        return [_convert.worker_from_proto(worker) for worker in answer.workers]

    async def evict(
        self, session_id: str, mode: EvictMode | str = EvictMode.LAZY
    ) -> CommandOutcome:
        """Evicts a session now and waits until it is done.

        Raises:
            WrongStateError: It is generating.
            SessionNotFoundError: There is no such session.
        """
        answer = await self._core.call(
            self._core.admin.EvictSession,
            admin_service_pb2.EvictSessionRequest(
                session_id=session_id, mode=_convert.evict_mode_to_proto(mode)
            ),
        )
        return _convert.outcome_from_proto(answer.result)

    async def restore(self, session_id: str) -> CommandOutcome:
        """Restores a session now and waits until it is done.

        Raises:
            SessionNotFoundError: There is no such session.
            ExhaustedError: There is no room for it.
        """
        answer = await self._core.call(
            self._core.admin.RestoreSession,
            admin_service_pb2.RestoreSessionRequest(session_id=session_id),
        )
        return _convert.outcome_from_proto(answer.result)

    async def drop(self, session_id: str) -> CommandOutcome:
        """Forgets a session's KV on both sides; its next generation computes it again.

        Raises:
            WrongStateError: It is generating.
            SessionNotFoundError: There is no such session.
        """
        answer = await self._core.call(
            self._core.admin.DropSession,
            admin_service_pb2.DropSessionRequest(session_id=session_id),
        )
        return _convert.outcome_from_proto(answer.result)

    async def drain(self, worker_id: str, *, resume: bool = False) -> WorkerInfo:
        """Stops placing sessions on a worker, or starts again; returns it as it is now.

        Raises:
            WorkerNotFoundError: No worker of this name is connected.
        """
        answer = await self._core.call(
            self._core.admin.DrainWorker,
            admin_service_pb2.DrainWorkerRequest(worker_id=worker_id, resume=resume),
        )
        return _convert.worker_from_proto(answer.worker)

    async def stats(self) -> Stats:
        """Returns what the system has done, all workers together."""
        answer = await self._core.read(
            self._core.admin.GetStats, admin_service_pb2.GetStatsRequest()
        )
        return _convert.stats_from_proto(answer)
