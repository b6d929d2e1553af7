"""The workers: who is connected, what each can hold, what it last reported, what all have done."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from services.common.errors import UnknownWorkerError
from services.scheduler.domain import Command, Counters, Hello, PoolState, Report
from services.scheduler.policy.view import WorkerView
from services.scheduler.prompts import ASSUMED_TOKENS, Prompts

_RECOMPUTE_MEMORY_S = 5.0
_SPEED_MEMORY_S = 600.0


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
        prefetched_blocks: Blocks asked for by prefetches since then.
        prefetch_refused: A prefetch was refused since then.
        dropped_blocks: Host blocks of sessions dropped since then.
        opened: Sessions placed since then.
        full_s: When it last reported that no device block was free; None: never.
        recompute_share: Share of its time that went to prefilling lost KV again, of late.
        prefill_tokens_per_s: How fast it computes long prompts; 0: not measured.
        prompts: Prompts that it has to compute.
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
    prefetched_blocks: int = 0
    prefetch_refused: bool = False
    dropped_blocks: int = 0
    opened: int = 0
    full_s: float | None = None
    recompute_share: float = 0.0
    prefill_tokens_per_s: float = 0.0
    prompts: Prompts = field(default_factory=Prompts)
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
            prefill_tokens_per_s=self.prefill_tokens_per_s,
            loads_in_flight=report.loads_in_flight,
            stores_in_flight=report.stores_in_flight,
            max_running_sequences=hello.capacity.max_running_sequences,
            max_context_length=hello.model.max_context_length,
            full_s=self.full_s,
            prefetched_blocks=self.prefetched_blocks,
            prefetch_refused=self.prefetch_refused,
            dropped_blocks=self.dropped_blocks,
            opened=self.opened,
            prompt_tokens=self.prompts.tokens,
            recompute_share=self.recompute_share,
        )

    def take(self, report: Report) -> None:
        """Takes in a report that has come at `heard_s`; what was counted since the last is over."""
        before, before_s = self.report, self.reported_s
        self.report = report
        self.reported_s = self.heard_s
        self._start_count()
        # The last percent hardly ever is free at the moment of a report.
        if report.device.free <= report.device.total // 100:
            self.full_s = self.heard_s
        self.prompts.expire(self.heard_s)
        if before is None:
            self.prefill_tokens_per_s = report.prefill_tokens_per_s
            return
        self.prompts.computed(report.counters.prefilled_tokens - before.counters.prefilled_tokens)
        passed_s = self.heard_s - before_s
        # What a worker reports is slowed by the short prompts of late, of which a step takes few:
        # the best of late is how fast long ones go.
        faded = self.prefill_tokens_per_s * math.exp(-max(0.0, passed_s) / _SPEED_MEMORY_S)
        self.prefill_tokens_per_s = max(report.prefill_tokens_per_s, faded)
        if passed_s <= 0 or not self.prefill_tokens_per_s:
            return
        again = report.counters.recomputed_tokens - before.counters.recomputed_tokens
        share = min(1.0, again / self.prefill_tokens_per_s / passed_s)
        kept = math.exp(-passed_s / _RECOMPUTE_MEMORY_S)
        self.recompute_share = kept * self.recompute_share + (1.0 - kept) * share

    def restart(self) -> None:
        """Takes in that another process answers to its name, which has reported nothing."""
        self.report = None
        self.full_s = None
        self.recompute_share = 0.0
        self.prefill_tokens_per_s = 0.0
        self.prompts = Prompts()
        self._start_count()

    def _start_count(self) -> None:
        self.unreported_blocks = 0
        self.prefetched_blocks = 0
        self.prefetch_refused = False
        self.dropped_blocks = 0
        self.opened = 0


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

    def typical_prompt_tokens(self) -> int:
        """Returns what a first prompt of unknown length is counted for, wherever it goes."""
        typical = [
            worker.prompts.typical_tokens
            for worker in self._workers.values()
            if worker.link is not None
        ]
        return sum(typical) // len(typical) if typical else ASSUMED_TOKENS

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
            worker.restart()
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
        # Whoever takes in a message has noted before when it came.
        worker.take(report)
        self.changed(worker)

    def assign(self, worker: WorkerState, session_id: str, blocks: int = 0) -> None:
        """Notes that a session is placed on a worker and is expected to need some blocks."""
        if session_id not in worker.sessions:
            worker.sessions.add(session_id)
            worker.opened += 1
        worker.unreported_blocks += blocks
        self.changed(worker)

    def unassign(self, worker_id: str, session_id: str) -> None:
        """Notes that a session is no longer placed on a worker."""
        worker = self._workers.get(worker_id)
        if worker is not None:
            worker.sessions.discard(session_id)
            worker.prompts.end(session_id)
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
