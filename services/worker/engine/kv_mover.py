"""Moves sessions' KV between the tiers: block manager and copy engine put together.

What is decided elsewhere - which session, when - is carried out here, and what happened is
counted here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec
import torch

from services.worker.engine.block import Block, CopyTicket, Direction
from services.worker.engine.block_manager import BlockManager
from services.worker.engine.copies import coalesce, divide
from services.worker.engine.sequence import Session
from services.worker.engine.streams import Event
from services.worker.engine.transfer import CopyJob, Priority, Transfers
from services.worker.messages import Mode


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


class KvMover:
    """Carries out holds, evictions and stores.

    Attributes:
        mode: How the engine serves now; changed by `set_mode`.

    Args:
        blocks: The bookkeeping; mutated.
        transfers: The copy engine.
        device: The device pool's bytes, uint8, one dimension.
        host: The host pool's bytes, uint8, one dimension.
        block_bytes: Bytes of a block.
        host_seam_blocks: The host pool is pinned in pieces of this many blocks; None: in one.

    Attributes:
        blocks: The bookkeeping.
        block_bytes: Bytes of a block.
        counters: What has been moved.
        load_bytes_per_s: Of late; 0 before the first load.
        held: The sessions whose blocks are held on the device.
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
        self.mode = Mode()
        self.counters = MoverCounters()
        self.load_bytes_per_s = 0.0
        self._last_load_end_ns = 0
        self._transfers = transfers
        self._device = device
        self._host = host
        self.block_bytes = block_bytes
        self._host_seam_blocks = host_seam_blocks
        self._jobs: dict[CopyJob, CopyTicket] = {}
        self._job_of: dict[CopyTicket, CopyJob] = {}
        self._waiting_for_load: dict[CopyTicket, list[Session]] = {}
        self.held: dict[Session, None] = {}
        # Evicted with blocks that the host had no room for; in order of eviction.
        self._stranded: dict[Session, None] = {}

    def set_mode(self, mode: Mode) -> list[Session]:
        """Moves KV in another mode from now on; copies that there are serve until they are let go.

        Returns:
            The sessions that are dropped, because their eviction waits for stores of which there
            will be none.
        """
        self.mode = mode
        dropped = [] if mode.offload else list(self._stranded)
        for session in dropped:
            self.drop(session)
        return dropped

    # --- one session -----------------------------------------------------------------------------

    def hold(
        self,
        session: Session,
        priority: Priority,
        more_blocks: int = 0,
        own_blocks: int | None = None,
        layer_groups: int = 1,
    ) -> bool:
        """Holds a session's blocks and starts the loads that this takes.

        Args:
            session: Whose.
            priority: Of the loads.
            more_blocks: New blocks that there must be room for too.
            own_blocks: Blocks that were the session's before; those after them were found in the
                prefix index. None: all.
            layer_groups: The loads bring this many groups of adjoining layers one after another;
                a divisor of the number of layers. See `load_events`.

        Returns:
            False, with nothing changed, if there is no room for them and `more_blocks` new ones.
        """
        table = session.kv
        if table.held:
            for ticket in session.loading:
                self._transfers.hasten(self._job_of[ticket], priority, to_device=True)
            return self.blocks.available_device() >= more_blocks
        found = [] if own_blocks is None else table.blocks[own_blocks:]
        found_resident = sum(block.device is not None for block in found)
        hold = self.blocks.hold(table, more_blocks)
        if hold is None:
            return False
        resident = hold.resident_blocks - found_resident
        self.held[session] = None
        self._stranded.pop(session, None)
        session.used_ns = time.time_ns()
        loaded = 0
        if hold.ticket is not None:
            loaded = len(hold.ticket.copies)
            self._start(hold.ticket, priority, layer_groups)
            self._wait_for_load(session, hold.ticket)
        for ticket in hold.others:
            self._wait_for_load(session, ticket)
            self._transfers.hasten(self._job_of[ticket], priority, to_device=True)
        self._count_hold(session, resident, priority)
        session.source = msgspec.structs.replace(
            session.source,
            resident_blocks=session.source.resident_blocks + resident,
            loaded_blocks=session.source.loaded_blocks + loaded,
            loaded_bytes=session.source.loaded_bytes + loaded * self.block_bytes,
        )
        return True

    def _wait_for_load(self, session: Session, ticket: CopyTicket) -> None:
        session.loading.add(ticket)
        self._waiting_for_load.setdefault(ticket, []).append(session)

    def _count_hold(self, session: Session, resident_blocks: int, priority: Priority) -> None:
        self.counters.resident_hit_blocks += resident_blocks
        if session.known_tokens == 0 or not session.kv.blocks:
            return  # nothing of its own comes back
        if priority is Priority.PREFETCH:
            self.counters.prefetches += 1
        else:
            self.counters.restores += 1

    def loading_s(self, session: Session) -> float:
        """Returns how long a session's loads will go on, going by the speed of earlier ones.

        Args:
            session: Held; all that it waits for was started when it was.

        Returns:
            Infinity if nobody can tell: others are being loaded too, or nobody ever was.
        """
        others = self._transfers.in_flight(to_device=True) - len(session.loading)
        if others or not self.load_bytes_per_s:
            return math.inf
        start_ns = max(session.used_ns, self._last_load_end_ns)
        return (
            session.source.loaded_bytes / self.load_bytes_per_s - (time.time_ns() - start_ns) / 1e9
        )

    def load_events(self, session: Session, layer_groups: int) -> list[list[Event]]:
        """Returns what compute must wait for before it reads a session's blocks, group by group.

        Loads that serve somebody else too, and are divided otherwise, are waited for whole.

        Args:
            session: Held with priority `WAKE`, so that all its loads have been launched.
            layer_groups: Groups of adjoining layers.

        Returns:
            For each group the events to be reached before its layers run; the same events may
            stand in several groups. Empty lists if nothing is being loaded.
        """
        groups: list[list[Event]] = [[] for _ in range(layer_groups)]
        for ticket in session.loading:
            job = self._job_of[ticket]
            assert len(job.part_events) == len(job.parts), "not launched yet"
            for index, events in enumerate(groups):
                part = index if len(job.parts) == layer_groups else -1
                events.append(job.part_events[part])
        return groups

    def evict(self, session: Session) -> set[CopyTicket]:
        """Lets a session's device blocks go and starts the stores that this takes.

        Without offload it forgets the session's KV instead.

        Returns:
            The stores that have to end before all its blocks can be reused.
        """
        if not self.mode.offload:
            if session.kv.blocks:
                self.drop(session)
            # Copies from before this mode would bring back what is to be computed again.
            self.blocks.give_up_copies(self.blocks.host_slots)
            return set()
        self.blocks.unhold(session.kv)
        self.held.pop(session, None)
        self._store(session.kv.blocks, Priority.EVICT, give_up_copies=True)
        stores = [block.store for block in session.kv.blocks if not block.clean]
        if None in stores:
            self._stranded[session] = None
        return {store for store in stores if store is not None}

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
        self.held.pop(session, None)
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
        self._last_load_end_ns = job.end_ns
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

    def _start(self, ticket: CopyTicket, priority: Priority, layer_groups: int = 1) -> None:
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
        parts = divide(runs, self.block_bytes, layer_groups)
        job = CopyJob(source, destination, parts, priority, ticket.after)
        self._jobs[job] = ticket
        self._job_of[ticket] = job
        self._transfers.submit(job, to_device=to_device)

    @property
    def stranded(self) -> bool:
        """True if evicted sessions have blocks that the host has no room for."""
        return bool(self._stranded)

    def store_stranded(self) -> None:
        """Tries again to store evicted sessions that the host had no room for."""
        for session in list(self._stranded):
            if not self.blocks.available_host():
                return
            del self._stranded[session]
            if not session.kv.held:
                self.evict(session)
