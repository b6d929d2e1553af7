"""A block of KV, the tables that list blocks, and the copies that move them.

A `Block` may have a slot in the device pool, one in the host pool, or both:

* *dirty*: the device has tokens that the host has not (``stored_tokens < filled_tokens``);
* *clean*: both have all of them;
* *host*: only the host has them.

A block is *referenced* by every table it stands in and *held* by those tables that need it on the
device.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from services.worker.engine.streams import Event


class Direction(Enum):
    """Which way a copy goes."""

    LOAD = "host to device"
    STORE = "device to host"


@dataclass(eq=False, slots=True)
class Block:
    """KV of up to `block_size_tokens` tokens.

    Attributes:
        device: Its slot in the device pool.
        host: Its slot in the host pool.
        filled_tokens: Tokens whose KV a launched step has written.
        stored_tokens: Tokens whose KV the host slot holds.
        refs: Tables it stands in.
        holders: Tables that need it on the device.
        content_hash: Its key in the prefix index, while it is there.
        load: What brings it from its host slot to its device slot now; None if nothing does.
        stores: Copies in flight the other way.
        store: The newest store that will make it clean; None if none will.
        reclaim_rank: Names its entry in the order of reuse, while it is reclaimable.
        spare_in: The list it stands in while its host slot is spare.
        expected_wake_ns: When the table that last let it go will need it again; None: unknown.
    """

    device: int | None = None
    host: int | None = None
    filled_tokens: int = 0
    stored_tokens: int = 0
    refs: int = 0
    holders: int = 0
    content_hash: bytes | None = None
    load: CopyTicket | None = field(default=None, repr=False)
    stores: int = 0
    store: CopyTicket | None = field(default=None, repr=False)
    reclaim_rank: int | None = None
    spare_in: OrderedDict[Block, None] | None = field(default=None, repr=False)
    expected_wake_ns: int | None = None

    @property
    def clean(self) -> bool:
        """True if the host has all of it."""
        return self.host is not None and self.stored_tokens == self.filled_tokens


class BlockCopy(NamedTuple):
    """One block of a ticket, with the slots and the tokens as they were when it was made."""

    block: Block
    device: int
    host: int
    tokens: int


@dataclass(eq=False, frozen=True, slots=True)
class CopyTicket:
    """Blocks to copy in one go.

    Attributes:
        direction: Which way.
        copies: What; never empty.
        after: Events of launched steps that must be reached first (rules 1 and 7).
    """

    direction: Direction
    copies: tuple[BlockCopy, ...]
    after: tuple[Event, ...]


@dataclass(eq=False, slots=True)
class BlockTable:
    """One session's KV: its blocks in order of position.

    Attributes:
        blocks: All but the last are full.
        slots: Their device slots, while the table is held.
        tokens: Tokens whose KV the blocks hold; a launched step counts.
        held: True if the session needs its blocks on the device.
        expected_wake_ns: When it will need them again, if not held; None: unknown, taken as far.
    """

    blocks: list[Block] = field(default_factory=list)
    slots: array[int] = field(default_factory=lambda: array("i"))
    tokens: int = 0
    held: bool = False
    expected_wake_ns: int | None = None


@dataclass(frozen=True, slots=True)
class Hold:
    """What it took to hold a table.

    Attributes:
        resident_blocks: Blocks taken back without a copy.
        ticket: The loads to carry out; None if there are none of its own.
        others: Loads in flight for other tables that bring some of its blocks.
    """

    resident_blocks: int
    ticket: CopyTicket | None
    others: tuple[CopyTicket, ...]


def hash_blocks(
    tokens: Sequence[int], block_size_tokens: int, salt: bytes, known: list[bytes]
) -> None:
    """Extends `known`, chained hashes of a context's full blocks, to all full blocks of `tokens`.

    Args:
        tokens: The context.
        block_size_tokens: Tokens per block.
        salt: Model revision, dtype, layout and tenant; blocks of other salts never match.
        known: Hashes of its first blocks; mutated.
    """
    previous = known[-1] if known else hashlib.blake2b(salt, digest_size=16).digest()
    for start in range(len(known) * block_size_tokens, len(tokens), block_size_tokens):
        piece = tokens[start : start + block_size_tokens]
        if len(piece) < block_size_tokens:
            return
        previous = hashlib.blake2b(previous + array("i", piece).tobytes(), digest_size=16).digest()
        known.append(previous)
