"""The workers: who is connected, what each can hold, what it last reported, what all have done."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from services.common.errors import UnknownWorkerError
from services.scheduler.domain import Command, Counters, Hello, PoolState, Report
from services.scheduler.policy.view import WorkerView


class Link(Protocol):
    """The way to one worker process."""

    def send(self, command: Command, caused_s: float | None) -> None:
        """Queues a command; never waits and never fails.

        Args:
            command: What to send.
            caused_s: When the signal that caused it was received; None: no signal did.
        """

    def close(self, reason: str) -> None:
        """Ends the stream, saying why."""


@dataclass(slots=True)
class WorkerState:
    """One worker.

    Attributes:
        hello: What it said when it last connected, without the snapshot.
        link: None while it is not connected.
        report: Its last; None: none yet.
        drained: An operator asked that nothing be placed on it.
        sessions: Ids of the sessions placed on it.
        unreported_blocks: Blocks that sessions placed since the last report are expected to need.
        heard_s: When its last message came.
        reported_s: When its last report came; meaningless without one.
        lost_s: When its stream ended; meaningless while connected.
    """

    hello: Hello
    link: Link | None
    report: Report | None = None
    drained: bool = False
    sessions: set[str] = field(default_factory=set)
    unreported_blocks: int = 0
    heard_s: float = 0.0
    reported_s: float = 0.0
    lost_s: float = 0.0

    @property
    def draining(self) -> bool:
        """Whether nothing is to be placed on it."""
        return self.drained or self.hello.draining

    def view(self) -> WorkerView:
        """Returns the worker as a policy sees it."""
        hello = self.hello
        report = self.report
        device = report.device if report else _all_free(hello.capacity.device_blocks)
        host = report.host if report else _all_free(hello.capacity.host_blocks)
        report = report or Report()
        return WorkerView(
            worker_id=hello.worker_id,
            model=hello.model.model,
            draining=self.draining,
            block_bytes=hello.model.block_bytes,
            block_size_tokens=hello.model.block_size_tokens,
            device=device,
            host=host,
            sessions=len(self.sessions),
            unreported_blocks=self.unreported_blocks,
            running_sequences=report.running_sequences,
            waiting_requests=report.waiting_requests,
            mean_step_s=report.mean_step_s,
            load_bytes_per_s=report.load_bytes_per_s,
            prefill_tokens_per_s=report.prefill_tokens_per_s,
            loads_in_flight=report.loads_in_flight,
            stores_in_flight=report.stores_in_flight,
        )


class Registry:
    """All workers by id, those that are lost included until they are forgotten."""

    def __init__(self) -> None:
        self._workers: dict[str, WorkerState] = {}
        self._views: dict[str, WorkerView] = {}
        self._past = Counters()

    def __iter__(self) -> Iterator[WorkerState]:
        return iter(self._workers.values())

    def get(self, worker_id: str) -> WorkerState | None:
        """Returns a worker, connected or lost; None if it is not known."""
        return self._workers.get(worker_id)

    def connected(self, worker_id: str) -> WorkerState | None:
        """Returns a worker that is connected; None if it is not."""
        worker = self._workers.get(worker_id)
        return worker if worker is not None and worker.link is not None else None

    def require(self, worker_id: str) -> WorkerState:
        """Returns a connected worker.

        Raises:
            UnknownWorkerError: None of that id is connected.
        """
        worker = self.connected(worker_id)
        if worker is None:
            raise UnknownWorkerError(
                f"no worker {worker_id!r} is connected", metadata={"worker_id": worker_id}
            )
        return worker

    @property
    def views(self) -> Mapping[str, WorkerView]:
        """The connected workers as a policy sees them."""
        return self._views

    def connect(self, hello: Hello, link: Link, now_s: float) -> tuple[WorkerState, bool]:
        """Takes in a worker that has connected.

        A stream that it had is ended: the new one replaces it.

        Returns:
            The worker, and whether it is the same process as before.
        """
        lean = Hello(
            worker_id=hello.worker_id,
            incarnation_id=hello.incarnation_id,
            endpoint=hello.endpoint,
            model=hello.model,
            capacity=hello.capacity,
            metrics_endpoint=hello.metrics_endpoint,
            draining=hello.draining,
        )
        worker = self._workers.get(hello.worker_id)
        if worker is None:
            worker = self._workers[hello.worker_id] = WorkerState(lean, link, heard_s=now_s)
            self.changed(worker)
            return worker, False
        if worker.link is not None:
            worker.link.close(f"replaced by a newer stream of worker {hello.worker_id!r}")
        same = worker.hello.incarnation_id == hello.incarnation_id
        if not same:
            self._bank(worker)
            worker.report = None
            worker.unreported_blocks = 0
        worker.hello = lean
        worker.link = link
        worker.heard_s = now_s
        self.changed(worker)
        return worker, same

    def lose(self, worker_id: str, link: Link, now_s: float) -> WorkerState | None:
        """Marks a worker lost whose stream has ended.

        Returns:
            The worker; None if the stream was not its current one.
        """
        worker = self._workers.get(worker_id)
        if worker is None or worker.link is not link:
            return None
        worker.link = None
        worker.lost_s = now_s
        self.changed(worker)
        return worker

    def report(self, worker: WorkerState, report: Report) -> None:
        """Takes in a worker's report."""
        worker.report = report
        # Whoever takes in a message has noted before when it came.
        worker.reported_s = worker.heard_s
        worker.unreported_blocks = 0
        self.changed(worker)

    def assign(self, worker: WorkerState, session_id: str, blocks: int = 0) -> None:
        """Notes that a session is placed on a worker and is expected to need some blocks."""
        worker.sessions.add(session_id)
        worker.unreported_blocks += blocks
        self.changed(worker)

    def unassign(self, worker_id: str, session_id: str) -> None:
        """Notes that a session is no longer placed on a worker."""
        worker = self._workers.get(worker_id)
        if worker is not None:
            worker.sessions.discard(session_id)
            self.changed(worker)

    def changed(self, worker: WorkerState) -> None:
        """Makes the worker's view anew."""
        if worker.link is None:
            self._views.pop(worker.hello.worker_id, None)
        else:
            self._views[worker.hello.worker_id] = worker.view()

    def forget_lost(self, before_s: float) -> None:
        """Forgets workers lost before a time that have no sessions; their counters stay counted."""
        gone = [
            worker
            for worker in self._workers.values()
            if worker.link is None and worker.lost_s < before_s and not worker.sessions
        ]
        for worker in gone:
            self._bank(worker)
            del self._workers[worker.hello.worker_id]

    def totals(self) -> Counters:
        """Returns what all worker processes have done, those that ended included."""
        live = (worker.report.counters for worker in self if worker.report)
        return Counters.sum((self._past, *live))

    def report_time_s(self) -> float | None:
        """Returns when the oldest of the connected workers' last reports came.

        None if no worker is connected, or one of them has not reported yet.
        """
        connected = [worker for worker in self if worker.link is not None]
        if not connected or any(worker.report is None for worker in connected):
            return None
        return min(worker.reported_s for worker in connected)

    def pools(self) -> tuple[PoolState, PoolState]:
        """Returns the device pools and the host pools of all connected workers as one each."""
        views = self._views.values()
        return (
            PoolState.sum(view.device for view in views),
            PoolState.sum(view.host for view in views),
        )

    def _bank(self, worker: WorkerState) -> None:
        if worker.report is not None:
            self._past = Counters.sum((self._past, worker.report.counters))


def _all_free(blocks: int) -> PoolState:
    return PoolState(total=blocks, free=blocks)
