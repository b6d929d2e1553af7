"""Where sessions' KV lies in a modelled worker: the worker's block manager, in counts.

A session's blocks are told apart by number only, not one by one, and are not shared with other
sessions. All else is the worker's: blocks are dirty, clean or on the host, an evicted session's
device blocks may be reused and stay until they are, furthest expected wake first, and host copies
of what is held on the device are given up first. Of each session::

    held      device == blocks, and `spare` more for what is to be computed
    not held  blocks - clean are on the device, being stored or without room on the host;
              the rest of `device` is reclaimable
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict

NEVER_S = math.inf
"""An expected wake that nobody has an idea of: as far as can be."""


class SessionKv:
    """One session's blocks.

    Attributes:
        tokens: Tokens whose KV there is.
        blocks: Blocks that they fill.
        spare: Device blocks more, for tokens to come.
        device: Blocks on the device, `spare` not counted.
        clean: Blocks with a whole copy on the host.
        storing: Blocks being stored.
        loading: Blocks being loaded; their host copies stay.
        held: On the device to stay.
        busy: A request waits or runs.
        wake_s: When it is expected to be needed.
        used: Counts uses of any session; larger was used later.
        epoch: Counts how often all was dropped; a copy of an earlier one is nobody's.
    """

    __slots__ = (
        "blocks",
        "busy",
        "clean",
        "device",
        "epoch",
        "held",
        "listed",
        "loading",
        "moving",
        "ranked",
        "reclaimable",
        "spare",
        "storing",
        "tail_stale",
        "tokens",
        "used",
        "version",
        "wake_s",
    )

    def __init__(self) -> None:
        self.tokens = 0
        self.blocks = 0
        self.spare = 0
        self.device = 0
        self.clean = 0
        self.storing = 0
        self.loading = 0
        self.held = False
        self.busy = False
        self.wake_s = NEVER_S
        self.used = 0
        self.epoch = 0
        # As they are counted in the pool's sums.
        self.reclaimable = 0
        self.moving = 0
        self.listed = 0
        # The heaps' entries of an earlier version are void.
        self.version = 0
        self.ranked = -1
        # The tail has grown since its store began.
        self.tail_stale = False

    @property
    def dirty(self) -> int:
        """Blocks without a copy on the host, finished or begun."""
        return self.blocks - self.clean - self.storing


class _Ranking:
    """Sessions by furthest expected wake, then by a number that counts up, then first come.

    An entry is void once its session has another version; void ones are passed over, and cleared
    away when they are most.
    """

    __slots__ = ("_heap", "_limit", "_pushed")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, int, int, SessionKv]] = []
        self._pushed = 0
        self._limit = 64

    def push(self, kv: SessionKv, number: int) -> None:
        self._pushed += 1
        heapq.heappush(self._heap, (-kv.wake_s, number, self._pushed, kv.version, kv))
        if len(self._heap) > self._limit:
            self._heap = [entry for entry in self._heap if entry[3] == entry[4].version]
            heapq.heapify(self._heap)
            self._limit = 64 + 2 * len(self._heap)

    def first(self) -> SessionKv | None:
        while self._heap:
            _, _, _, version, kv = self._heap[0]
            if version == kv.version:
                return kv
            heapq.heappop(self._heap)
        return None

    def pop(self) -> None:
        heapq.heappop(self._heap)


class KvModel:
    """Both pools of a worker.

    Args:
        device_blocks: Blocks of the device pool.
        host_blocks: Blocks of the host pool.
        block_size_tokens: Tokens per block.
        offload: What is evicted has a copy on the host; else its blocks, the last one first, are
            lost with their reuse.
    """

    def __init__(
        self,
        device_blocks: int,
        host_blocks: int,
        block_size_tokens: int,
        *,
        offload: bool = True,
    ) -> None:
        self.offload = offload
        self.device_blocks = device_blocks
        self.host_blocks = host_blocks
        self.block_size_tokens = block_size_tokens
        self.device_free = device_blocks
        self.host_free = host_blocks
        self.reclaimable = 0
        self.moving = 0
        # Host blocks that a store writes, and those that hold copies of what is held.
        self.host_moving = 0
        self.host_spare = 0
        self._counted = 0
        # By (-expected wake, order): what is reused, evicted and dropped first.
        self._reclaim = _Ranking()
        self._idle_held = _Ranking()
        self._idle_evicted = _Ranking()
        self._copies: OrderedDict[SessionKv, None] = OrderedDict()

    # --- what there is ---------------------------------------------------------------------------

    def available(self) -> int:
        """Returns how many device blocks can be had at once."""
        return self.device_free + self.reclaimable

    def coming(self) -> int:
        """Returns how many device blocks can be had once the stores under way end."""
        return self.device_free + self.reclaimable + self.moving

    def blocks_for(self, tokens: int) -> int:
        """Returns how many blocks `tokens` tokens fill."""
        return -(-tokens // self.block_size_tokens)

    def room_needed(self, kv: SessionKv, more: int) -> int:
        """Returns how many blocks must be available to hold a session and `more` blocks."""
        if kv.held:
            return more - kv.spare
        return kv.blocks - kv.device + kv.reclaimable + more

    # --- on the device ---------------------------------------------------------------------------

    def hold(self, kv: SessionKv, more: int) -> int | None:
        """Holds a session's blocks on the device, with room for `more` blocks.

        Returns:
            How many must be loaded; None, with nothing changed, if there is no room.
        """
        if self.available() < self.room_needed(kv, more):
            return None
        if kv.held:
            self._take(max(0, more - kv.spare))
            kv.spare = max(kv.spare, more)
            return 0
        missing = kv.blocks - kv.device
        kv.held = True
        kv.version += 1
        self._settle(kv)
        self._take(missing + more)
        kv.device = kv.blocks
        kv.spare = more
        kv.loading = missing
        self._list_copies(kv)
        return missing

    def loaded(self, kv: SessionKv, epoch: int, blocks: int) -> None:
        """Takes in that a load is done."""
        if epoch != kv.epoch:
            self.device_free += blocks
            self.host_free += blocks
            return
        kv.loading = 0
        self._list_copies(kv)
        if not kv.busy:
            self.rest(kv)

    def advance(self, kv: SessionKv, tokens: int) -> None:
        """Counts KV as computed, up to `tokens` tokens; there must be spare blocks for it."""
        grows = kv.tokens % self.block_size_tokens and tokens > kv.tokens
        if grows and not kv.dirty:
            # The tail's copy lacks what comes now.
            if kv.storing:
                kv.tail_stale = True
            else:
                kv.clean -= 1
                self.host_free += 1
                self._list_copies(kv)
        new = self.blocks_for(tokens) - kv.blocks
        kv.tokens = tokens
        kv.blocks += new
        kv.device += new
        kv.spare -= new
        assert kv.spare >= 0, "computed without room"

    def trim(self, kv: SessionKv) -> None:
        """Frees what a held session has spare."""
        self.device_free += kv.spare
        kv.spare = 0

    def rest(self, kv: SessionKv) -> None:
        """Lists a held session without a request among those that may be evicted."""
        if kv.held:
            kv.version += 1
            self._idle_held.push(kv, kv.used)

    def use(self, kv: SessionKv) -> None:
        """Counts a use of a session."""
        self._counted += 1
        kv.used = self._counted

    def unhold(self, kv: SessionKv) -> None:
        """Lets a session's device blocks go: the clean ones may be reused from now on."""
        self.trim(kv)
        kv.held = False
        kv.version += 1
        self._list_copies(kv)
        self._settle(kv)
        if not kv.busy:
            self._idle_evicted.push(kv, kv.used)

    def set_wake(self, kv: SessionKv, wake_s: float) -> None:
        """Changes when a session is expected to be needed, and so the order of reuse."""
        if wake_s == kv.wake_s:
            return
        kv.wake_s = wake_s
        if kv.held:
            if not kv.busy and not kv.loading:
                self.rest(kv)
            return
        kv.version += 1
        self._settle(kv)
        if not kv.busy:
            self._idle_evicted.push(kv, kv.used)

    def pop_idle_held(self) -> SessionKv | None:
        """Returns the held session without a request that is worth least; None: there is none."""
        while (kv := self._idle_held.first()) is not None:
            self._idle_held.pop()
            if kv.held and not kv.busy and not kv.loading and kv.blocks:
                return kv
        return None

    def pop_idle_evicted(self) -> SessionKv | None:
        """Returns the evicted session without a request that is worth least; None: none."""
        while (kv := self._idle_evicted.first()) is not None:
            self._idle_evicted.pop()
            if not kv.held and not kv.busy and kv.blocks:
                return kv
        return None

    # --- on the host -----------------------------------------------------------------------------

    def begin_store(self, kv: SessionKv, *, full_only: bool, give_up_copies: bool) -> int:
        """Takes host blocks for a session's dirty blocks, as many as there are.

        Args:
            kv: Whose.
            full_only: Leave a last block that is not full.
            give_up_copies: Take host blocks from copies of what is held on the device too.

        Returns:
            How many blocks are to be stored.
        """
        wanted = kv.dirty
        if full_only:
            wanted = min(wanted, kv.tokens // self.block_size_tokens - kv.clean - kv.storing)
        if wanted <= 0:
            return 0
        if wanted > self.host_free and give_up_copies:
            self._give_up(wanted - self.host_free)
        taken = min(wanted, self.host_free)
        self.host_free -= taken
        self.host_moving += taken
        kv.storing += taken
        self._settle(kv)
        return taken

    def stored(self, kv: SessionKv, epoch: int, blocks: int) -> None:
        """Takes in that a store is done."""
        self.host_moving -= blocks
        if epoch != kv.epoch:
            self.device_free += blocks
            self.host_free += blocks
            self.moving -= blocks
            return
        kv.storing -= blocks
        kv.clean += blocks
        if kv.tail_stale and not kv.storing:
            kv.tail_stale = False
            kv.clean -= 1
            self.host_free += 1
        self._list_copies(kv)
        self._settle(kv)

    def drop(self, kv: SessionKv) -> None:
        """Forgets all of a session's blocks; those that a copy uses are freed when it is done."""
        self.trim(kv)
        self.host_free += kv.clean - kv.loading
        self.device_free += kv.device - kv.loading - kv.storing
        self.reclaimable -= kv.reclaimable
        self.moving += kv.storing - kv.moving
        self.host_spare -= kv.listed
        kv.listed = 0
        self._copies.pop(kv, None)
        kv.tokens = kv.blocks = kv.device = kv.clean = kv.storing = kv.loading = 0
        kv.reclaimable = kv.moving = 0
        kv.held = kv.tail_stale = False
        kv.epoch += 1
        kv.version += 1

    # --- within ----------------------------------------------------------------------------------

    def _take(self, blocks: int) -> None:
        """Takes device blocks that are known to be there."""
        left = blocks - self.device_free
        if left <= 0:
            self.device_free -= blocks
            return
        self.device_free = 0
        while left:
            kv = self._reclaim.first()
            assert kv is not None, "fewer blocks than were counted"
            if not kv.reclaimable:
                self._reclaim.pop()
                kv.ranked = -1
                continue
            taken = min(left, kv.reclaimable)
            left -= taken
            kv.device -= taken
            if not self.offload:
                kv.blocks = kv.device
                kv.tokens = min(kv.tokens, kv.blocks * self.block_size_tokens)
            kv.reclaimable -= taken
            self.reclaimable -= taken

    def _settle(self, kv: SessionKv) -> None:
        """Brings the sums in line with a session's state."""
        reusable, moving = 0, 0
        if not kv.held:
            reusable = kv.device - (kv.blocks - kv.clean) if self.offload else kv.device
            moving = kv.storing
        self.reclaimable += reusable - kv.reclaimable
        self.moving += moving - kv.moving
        kv.reclaimable, kv.moving = reusable, moving
        if reusable and kv.ranked != kv.version:
            kv.ranked = kv.version
            self._counted += 1
            self._reclaim.push(kv, self._counted)

    def _list_copies(self, kv: SessionKv) -> None:
        listed = kv.clean if kv.held and not kv.loading else 0
        self.host_spare += listed - kv.listed
        kv.listed = listed
        if listed:
            self._copies.setdefault(kv)
        else:
            self._copies.pop(kv, None)

    def _give_up(self, blocks: int) -> None:
        """Frees up to so many host blocks whose content is held on the device."""
        while blocks > 0 and self._copies:
            kv = next(iter(self._copies))
            taken = min(blocks, kv.clean)
            kv.clean -= taken
            self.host_free += taken
            blocks -= taken
            self._list_copies(kv)

    def check_integrity(self, sessions: list[SessionKv], orphans: tuple[int, int]) -> None:
        """Raises `AssertionError` if the sums contradict the sessions.

        Args:
            sessions: All there are.
            orphans: Blocks of dropped sessions in loads and in stores that go on.
        """
        loading, storing = orphans
        device = sum(kv.device + kv.spare for kv in sessions) + loading + storing
        host = sum(kv.clean + kv.storing for kv in sessions) + loading + storing
        assert self.device_free + device == self.device_blocks, (self.device_free, device)
        assert self.host_free + host == self.host_blocks, (self.host_free, host)
        assert self.reclaimable == sum(kv.reclaimable for kv in sessions)
        assert self.host_spare == sum(kv.clean for kv in self._copies)
        assert self.host_moving == sum(kv.storing for kv in sessions) + storing
        assert self.moving == sum(kv.moving for kv in sessions) + storing
        for kv in sessions:
            assert kv.blocks == self.blocks_for(kv.tokens), kv.tokens
            assert min(kv.spare, kv.dirty, kv.clean, kv.storing, kv.loading) >= 0
            assert kv.held or kv.device >= kv.blocks - kv.clean
            assert not kv.held or kv.device == kv.blocks
            assert kv.held or not (kv.spare or kv.loading)
