"""Both pools, their bookkeeping and the copies between them, without an engine.

The model is reduced to what matters to KV: a step writes tokens whose KV tells whose they are and
where they stand, and another step reads a session's KV back through its slots.
"""

from __future__ import annotations

import torch

from services.worker.engine.block_manager import BlockManager
from services.worker.engine.cuda_copies import choose_copy
from services.worker.engine.cuda_streams import CudaStream, DeviceClock
from services.worker.engine.kv_cache import KVCache
from services.worker.engine.kv_layout import KVLayout
from services.worker.engine.kv_mover import KvMover
from services.worker.engine.sequence import Session
from services.worker.engine.streams import CpuStream, Wakeup
from services.worker.engine.transfer import Priority, Transfers
from tests.support.held_stream import CudaGate, HeldStream, ThreadGate

BLOCK = 4
LAYER_GROUPS = 2
# 256 KiB: large enough that no driver copies it while the copy is being launched.
_LAYOUT = KVLayout(
    num_layers=4, block_size_tokens=BLOCK, num_kv_heads=8, head_dim=256, dtype=torch.float32
)


class KvStage:
    """The pools, the mover and three streams that can be held back.

    Args:
        device: Where the device pool is: on a CPU the streams are threads.
        device_blocks: Device pool, in blocks of `BLOCK` tokens.
        host_blocks: Host pool.
        ahead_bytes: See `Transfers`.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        device_blocks: int = 4,
        host_blocks: int = 8,
        ahead_bytes: int = 96 << 20,
    ) -> None:
        self._device = device
        self._wakeup = Wakeup()
        self._clock = DeviceClock(device) if device.type == "cuda" else None
        self.compute, self.load, self.store = (
            self._make_stream(name) for name in ("compute", "load", "store")
        )
        self.cache = KVCache(_LAYOUT, device_blocks, device)
        host = torch.zeros(
            host_blocks * _LAYOUT.block_bytes,
            dtype=torch.uint8,
            pin_memory=device.type == "cuda",
        )
        self.blocks = BlockManager(device_blocks, host_blocks, BLOCK)
        self.mover = KvMover(
            self.blocks,
            Transfers(self.load, self.store, ahead_bytes, copy=choose_copy(device)),
            self.cache.bytes,
            host,
            _LAYOUT.block_bytes,
        )
        self.sessions: list[Session] = []
        self._read_back = torch.empty_like(self.cache.kv)
        self._rehearse()

    def _make_stream(self, name: str) -> HeldStream:
        if self._device.type == "cuda":
            return HeldStream(name, CudaStream(self._device, self._clock), CudaGate)
        return HeldStream(name, CpuStream(name, self._wakeup), ThreadGate)

    def _rehearse(self) -> None:
        """Uses every kernel once, and leaves nothing but NaN behind."""
        slots = list(range(self.blocks.device_slots))
        self.compute.launch(lambda: self._write(slots, 0, 0, 1))
        self.compute.launch(lambda: self._read(slots, 0, _LAYOUT.num_layers))
        self.compute.launch(self._forget_what_was_read)
        self.cache.scrub(slots, self.compute).synchronize()

    def close(self) -> None:
        """Lets every stream go and ends it."""
        for stream in (self.compute, self.load, self.store):
            stream.let_go()
        for stream in (self.compute, self.load, self.store):
            stream.close()
        self._wakeup.close()

    # --- sessions --------------------------------------------------------------------------------

    def session(self, name: str) -> Session:
        """Returns a new session without KV."""
        session = Session(name, b"", 0)
        self.sessions.append(session)
        return session

    def step(self, session: Session, tokens: int, *, write_through: bool = False) -> bool:
        """Launches a step that writes a session's next tokens, as the engine does.

        Returns:
            False, with nothing launched, if the device has no room for them.
        """
        table = session.kv
        start, end = table.tokens, table.tokens + tokens
        more = self.blocks.blocks_for(end) - len(table.blocks)
        if not self.mover.hold(session, Priority.WAKE, more):
            return False
        assert self.blocks.loaded(table)
        assert self.blocks.reserve(table, end)
        slots = list(table.slots)
        who = self.sessions.index(session)
        self.compute.launch(lambda: self._write(slots, who, start, end))
        filled = self.blocks.advance(table, end)
        fence = self.compute.record()
        self.blocks.fence = fence
        if write_through:
            self.mover.write_through(filled, fence)
        return True

    def read_if_loaded(self, session: Session) -> bool:
        """Launches a step that reads a session's KV, if it may be read; `right` then judges it."""
        if not self.blocks.loaded(session.kv):
            return False
        self._launch_read(session, 0, _LAYOUT.num_layers)
        return True

    def read_behind_load(self, session: Session) -> None:
        """Launches a step that reads a session's KV while it is being loaded, layers in groups."""
        layers = _LAYOUT.num_layers // LAYER_GROUPS
        for group, events in enumerate(self.mover.load_events(session, LAYER_GROUPS)):
            for event in events:
                self.compute.wait(event)
            self._launch_read(session, group * layers, (group + 1) * layers)

    def _launch_read(self, session: Session, first_layer: int, end_layer: int) -> None:
        slots = list(session.kv.slots)
        self.compute.launch(lambda: self._read(slots, first_layer, end_layer))
        self.blocks.fence = self.compute.record()

    def right(self, session: Session) -> bool:
        """Waits for the last read and returns whether it found the session's own KV."""
        self.compute.record().synchronize()
        who = self.sessions.index(session)
        size = _LAYOUT.block_size_tokens
        return all(
            bool((self._read_back[index // size, :, :, index % size] == _mark(who, index)).all())
            for index in range(session.kv.tokens)
        )

    def evict(self, session: Session) -> None:
        """Evicts a session to its host copies, and scrubs the device blocks it had."""
        self.mover.evict(session)
        self.finish()
        assert self.mover.is_clean(session)
        slots = self.blocks.release_device(session.kv)
        if slots:
            self.blocks.touch(slots, self.cache.scrub(slots, self.compute))

    def finish(self) -> None:
        """Runs every copy and step to its end; no stream may be held back."""
        while self.mover.tickets():
            self.mover.poll()
        self.compute.record().synchronize()

    def intact(self, session: Session) -> bool:
        """Brings a session to the device, if it is not there; returns whether its KV is right."""
        self.finish()
        assert self.mover.hold(session, Priority.WAKE)
        self.finish()
        assert self.read_if_loaded(session)
        return self.right(session)

    def check_integrity(self) -> None:
        """Raises `AssertionError` if the bookkeeping contradicts itself."""
        self.blocks.check_integrity([s.kv for s in self.sessions], self.mover.tickets())

    # --- what runs on the compute stream ---------------------------------------------------------

    def _write(self, slots: list[int], who: int, start: int, end: int) -> None:
        for index in range(start, end):
            place = self.cache.kv[slots[index // BLOCK], :, :, index % BLOCK]
            place.fill_(_mark(who, index))

    def _read(self, slots: list[int], first_layer: int, end_layer: int) -> None:
        layers = slice(first_layer, end_layer)
        for index, slot in enumerate(slots):
            # A sum is a kernel, where a plain copy would go to a copy engine like a load.
            torch.add(self.cache.kv[slot, layers], 0, out=self._read_back[index, layers])

    def _forget_what_was_read(self) -> None:
        self._read_back.fill_(float("nan"))


def _mark(who: int, index: int) -> float:
    return float(1000 * (who + 1) + index)
