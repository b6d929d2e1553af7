"""What one process sends, the other reads."""

from __future__ import annotations

import msgspec
import pytest

from services.common.errors import ErrorInfo
from services.worker.messages import (
    Abort,
    Command,
    CommandDone,
    Evict,
    EvictMode,
    Mode,
    Rejected,
    Residency,
    SamplingParams,
    SetMode,
    Submit,
    ToEngine,
    ToFront,
    Tokens,
    decode_to_engine,
    decode_to_front,
    encode,
)


def test_batches_to_the_engine_come_back_as_they_were() -> None:
    batch: list[ToEngine] = [
        Abort("r1"),
        SetMode(Mode(write_through=False)),
        Command("c1", "s1", Evict(EvictMode.SCRUB, 5), 3, None, b"\x00record", 7),
        Submit(
            "r2",
            "s1",
            True,
            "salt",
            -1,
            b"",
            None,
            4,
            [1, 2],
            SamplingParams(0.5, 3, 0.9, 2**63),
            None,
            [2],
            0,
            False,
            9,
        ),
    ]
    assert decode_to_engine(encode(batch)) == batch


def test_batches_to_the_front_come_back_as_they_were() -> None:
    batch: list[ToFront] = [
        Tokens("r1", [5], [], [b"\x00\x01"]),
        Rejected("r2", ErrorInfo("NOT_FOUND", "SESSION_UNKNOWN", "no session", {"a": "b"}, 1.5)),
        CommandDone("c1", "s1", None, 4, Residency(3, 2, 1, 0, True)),
    ]
    assert decode_to_front(encode(batch)) == batch


def test_what_is_meant_for_the_other_side_is_refused() -> None:
    with pytest.raises(msgspec.MsgspecError):
        decode_to_front(encode([Abort("r1")]))
