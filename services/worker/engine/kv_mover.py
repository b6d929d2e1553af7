"""Moves sessions' KV between the tiers: block manager and copy engine put together.

What is decided elsewhere - which session, when - is carried out here, and what happened is
counted here. When room is short, `make_room` is the worker's own fallback: least worth first.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec
import torch

from services.worker.engine.block import Block, CopyTicket, Direction
from services.worker.engine.block_manager import BlockManager
from services.worker.engine.sequence import Session
from services.worker.engine.streams import Event
from services.worker.engine.transfer import CopyJob, Priority, Transfers, coalesce


@dataclass(slots=True)
class MoverCounters:
    """What has been moved, since the start; `djinn.v1.WorkerCounters` has the meanings."""

    stores: int = 0
    loads: int = 0
    stored_bytes: int = 0
    loaded_bytes: int = 0
    resident_hit_blocks: int = 0
    evictions: int = 0
    restores: int = 0
    prefetches: int = 0
    drops: int = 0


@dataclass(frozen=True, slots=True)
class FinishedCopy:
    """A ticket that has been carried out.

    Attributes:
        start_ns: Wall clock when its first byte was copied.
        end_ns: Wall clock when its last byte had been.
    """

    ticket: CopyTicket
    start_ns: int
    end_ns: int


def furthest_first(session: Session) -> tuple[float, int]:
    """Sort key: who is expected latest comes first, and of those unknown who was used longest ago.

    An unknown wake is taken as far.
    """
    wake = session.kv.expected_wake_ns
    return (-math.inf if wake is None else -float(wake), session.used_ns)


class KvMover:
    """Carries out holds, evictions and stores.

    Args:
        blocks: The bookkeeping; mutated.
        transfers: The copy engine.
        device: The device pool's bytes, uint8, one dimension.
        host: The host pool's bytes, uint8, one dimension.
        block_bytes: Bytes of a block.
        host_seam_blocks: The host pool is pinned in pieces of this many blocks; None: in one.
    """

    def __init__(
        self,
        blocks: BlockManager,
        transfers: Transfers,
        device: torch.Tensor,
        host: torch.Tensor,
        block_bytes: int,
        host_seam_blocks: int | None = None,
    ) -> None:
        self.blocks = blocks
        self.counters = MoverCounters()
        self.load_bytes_per_s = 0.0
        self._transfers = transfers
        self._device = device
        self._host = host
        self.block_bytes = block_bytes
        self._host_seam_blocks = host_seam_blocks
        self._jobs: dict[CopyJob, CopyTicket] = {}
        self._job_of: dict[CopyTicket, CopyJob] = {}
        self._waiting_for_load: dict[CopyTicket, list[Session]] = {}
        self._held: dict[Session, None] = {}
        # Evicted with blocks that the host had no room for; in order of eviction.
        self._stranded: dict[Session, None] = {}

    # --- one session -----------------------------------------------------------------------------

    def hold(
        self,
        session: Session,
        priority: Priority,
        more_blocks: int = 0,
        own_blocks: int | None = None,
    ) -> bool:
        """Holds a session's blocks and starts the loads that this takes.

        Args:
            session: Whose.
            priority: Of the loads.
            more_blocks: New blocks that there must be room for too.
            own_blocks: Blocks that were the session's before; those after them were found in the
                prefix index. None: all.

        Returns:
            False, with nothing changed, if there is no room for them and `more_blocks` new ones.
        """
        table = session.kv
        was_held = table.held
        if was_held:
            for ticket in session.loading:
                self._transfers.hasten(self._job_of[ticket], priority, to_device=True)
        if self.blocks.available_device() < self.blocks.room_needed(table, more_blocks):
            return False
        if was_held:
            return True
        own = table.blocks[:own_blocks]
        resident = sum(block.device is not None for block in own)
        hold = self.blocks.hold(table)
        assert hold is not None
        self._held[session] = None
        self._stranded.pop(session, None)
        session.used_ns = time.time_ns()
        loaded = 0
        if hold.ticket is not None:
            loaded = len(hold.ticket.copies)
            self._start(hold.ticket, priority)
        # Blocks that another session's load is still bringing are waited for too.
        coming = {block for block in table.blocks if block.loads}
        for ticket, job in self._job_of.items() if coming else ():
            if ticket.direction is Direction.LOAD and not coming.isdisjoint(
                copy.block for copy in ticket.copies
            ):
                if ticket not in session.loading:
                    session.loading.add(ticket)
                    self._waiting_for_load.setdefault(ticket, []).append(session)
                self._transfers.hasten(job, priority, to_device=True)
        self._count_hold(session, resident, priority)
        session.source = msgspec.structs.replace(
            session.source,
            resident_blocks=session.source.resident_blocks + resident,
            loaded_blocks=session.source.loaded_blocks + loaded,
            loaded_bytes=session.source.loaded_bytes + loaded * self.block_bytes,
        )
        return True

    def _count_hold(self, session: Session, resident_blocks: int, priority: Priority) -> None:
        self.counters.resident_hit_blocks += resident_blocks
        if session.known_tokens == 0 or not session.kv.blocks:
            return  # nothing of its own comes back
        if priority is Priority.PREFETCH:
            self.counters.prefetches += 1
        else:
            self.counters.restores += 1

    def evict(self, session: Session) -> set[CopyTicket]:
        """Lets a session's device blocks go and starts the stores that this takes.

        Returns:
            The stores that have to end before all its blocks can be reused.
        """
        self.blocks.unhold(session.kv)
        self._held.pop(session, None)
        self._store(session.kv.blocks, Priority.EVICT, give_up_copies=True)
        if any(not b.clean and b.store is None for b in session.kv.blocks):
            self._stranded[session] = None
        return self.stores_of(session)

    def stores_of(self, session: Session) -> set[CopyTicket]:
        """Returns the stores in flight that make the session's blocks clean."""
        return {block.store for block in session.kv.blocks if block.store is not None}

    def is_clean(self, session: Session) -> bool:
        """Returns True if the host has all of the session's KV."""
        return all(block.clean for block in session.kv.blocks)

    def write_through(self, filled: list[Block], fence: Event) -> None:
        """Copies blocks that a launched step fills to free host slots, behind that step."""
        self._store(filled, Priority.WRITE_THROUGH, give_up_copies=False, fence=fence)

    def drop(self, session: Session) -> None:
        """Forgets a session's KV on both sides."""
        self.forget(session)
        self.counters.drops += 1

    def forget(self, session: Session) -> None:
        """Frees a session's KV and stops waiting for anything on its behalf."""
        self.blocks.drop(session.kv)
        self.blocks.unhold(session.kv)
        self._held.pop(session, None)
        self._stranded.pop(session, None)
        for ticket in session.loading:
            self._waiting_for_load[ticket].remove(session)
        session.loading.clear()

    def discard(self, session: Session) -> None:
        """Frees a session's KV, which is worthless, and lets nobody else find it."""
        self.blocks.discard(session.kv)
        self.forget(session)

    # --- copies ----------------------------------------------------------------------------------

    def poll(self) -> list[FinishedCopy]:
        """Takes in the copies that are done and returns them."""
        finished = []
        for job in self._transfers.poll():
            ticket = self._jobs.pop(job)
            del self._job_of[ticket]
            self.blocks.finish(ticket)
            if ticket.direction is Direction.LOAD:
                self._loaded(ticket, job)
            else:
                self.counters.stores += 1
                self.counters.stored_bytes += job.size_bytes
            finished.append(FinishedCopy(ticket, job.start_ns, job.end_ns))
        if finished:
            self.store_stranded()
        return finished

    def tickets(self) -> list[CopyTicket]:
        """Returns the tickets in flight."""
        return list(self._job_of)

    def in_flight(self, *, to_device: bool) -> int:
        """Returns how many copy jobs of one direction wait or run."""
        return self._transfers.in_flight(to_device=to_device)

    def _loaded(self, ticket: CopyTicket, job: CopyJob) -> None:
        self.counters.loads += 1
        self.counters.loaded_bytes += job.size_bytes
        seconds = max(job.end_ns - job.start_ns, 1) / 1e9
        speed = job.size_bytes / seconds
        self.load_bytes_per_s = (
            speed if not self.load_bytes_per_s else 0.8 * self.load_bytes_per_s + 0.2 * speed
        )
        for session in self._waiting_for_load.pop(ticket, ()):
            session.loading.discard(ticket)
            source = session.source
            session.source = msgspec.structs.replace(
                source,
                load_start_ns=min(source.load_start_ns or job.start_ns, job.start_ns),
                load_end_ns=max(source.load_end_ns, job.end_ns),
            )

    def _store(
        self,
        blocks: Iterable[Block],
        priority: Priority,
        *,
        give_up_copies: bool,
        fence: Event | None = None,
    ) -> None:
        ticket = self.blocks.store(
            blocks,
            give_up_copies=give_up_copies,
            fence=self.blocks.fence if fence is None else fence,
        )
        if ticket is not None:
            self._start(ticket, priority)

    def _start(self, ticket: CopyTicket, priority: Priority) -> None:
        to_device = ticket.direction is Direction.LOAD
        seam = self._host_seam_blocks
        if to_device:
            pairs = [(copy.host, copy.device) for copy in ticket.copies]
            source, destination = self._host, self._device
            runs = coalesce(pairs, self.block_bytes, source_seam=seam)
        else:
            pairs = [(copy.device, copy.host) for copy in ticket.copies]
            source, destination = self._device, self._host
            runs = coalesce(pairs, self.block_bytes, destination_seam=seam)
        job = CopyJob(source, destination, runs, priority, ticket.after)
        self._jobs[job] = ticket
        self._job_of[ticket] = job
        self._transfers.submit(job, to_device=to_device)

    def store_stranded(self) -> None:
        """Tries again to store evicted sessions that the host had no room for."""
        for session in list(self._stranded):
            if not self.blocks.available_host():
                return
            del self._stranded[session]
            if not session.kv.held:
                self.evict(session)

    # --- when room is short ----------------------------------------------------------------------

    def make_room(
        self, want_blocks: int, sessions: Iterable[Session], waiting: Sequence[Session]
    ) -> tuple[list[Session], list[Session]]:
        """Works towards `want_blocks` available device blocks; some may come only later.

        First sessions that are idle on the device are evicted. Then, when the host is full too,
        sessions that are evicted already are dropped to tokens.

        Args:
            want_blocks: How many blocks shall be available.
            sessions: All; of those without a request the furthest expected wake goes first.
            waiting: Sessions whose request waits, in order of service; the last is dropped first,
                and only if no idle one is left. Only those that hold nothing are dropped.

        Returns:
            Those that were evicted, and those that were dropped.
        """
        evicted: list[Session] = []
        dropped: list[Session] = []
        if self.blocks.coming_device() >= want_blocks:
            return evicted, dropped
        for session in sorted(self._evictable(), key=furthest_first):
            self.evict(session)
            self.counters.evictions += 1
            evicted.append(session)
            if self.blocks.coming_device() >= want_blocks:
                return evicted, dropped
        if not self._stranded:
            return evicted, dropped
        idle = sorted((s for s in sessions if s.request is None), key=furthest_first)
        for session in (*idle, *reversed(waiting)):
            if not self._stranded or self.blocks.coming_device() >= want_blocks:
                break
            if not session.kv.held and session.kv.blocks:
                self.drop(session)
                dropped.append(session)
                self.store_stranded()
        return evicted, dropped

    def _evictable(self) -> list[Session]:
        return [
            session
            for session in self._held
            if session.request is None and session.kv.blocks and not session.loading
        ]
