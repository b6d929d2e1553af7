"""What one model step works on and what it gives: the contract of batcher and model runner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from services.worker.engine.streams import Event
from services.worker.messages import PositionLogprobs, SamplingParams


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """How to choose the token that follows a slice.

    Attributes:
        params: How to choose.
        position: Position in the context that the chosen token will have; seeds the choice.
        logprobs: How many likeliest tokens to report; None: none and not the chosen one's either.
        return_logits: Report the whole row of logits.
    """

    params: SamplingParams
    position: int
    logprobs: int | None = None
    return_logits: bool = False


@dataclass(frozen=True, slots=True)
class SequenceSlice:
    """One sequence's share of a step.

    Attributes:
        token_ids: The tokens to compute, at positions `start` and on; at least one.
        start: Tokens of the sequence whose KV is in the device pool already.
        block_table: Device block ids in order of position, enough for
            ``start + len(token_ids)`` tokens. KV of the new tokens is written there.
        sample: How to choose the next token; None if the slice ends within the prompt.
        follows: The slice's one token is the one that this slice of the step launched just before
            samples, which nobody on the host knows yet; `token_ids` holds any id in its place.
            None: the tokens are `token_ids`.
    """

    token_ids: list[int]
    start: int
    block_table: Sequence[int]
    sample: SampleRequest | None
    follows: int | None = None


@dataclass(frozen=True, slots=True)
class StepPlan:
    """All that one step computes.

    Attributes:
        slices: Those of one token (decodes) come first.
        after: What the step waits for on the device: loads of KV that it reads.
    """

    slices: tuple[SequenceSlice, ...]
    after: tuple[Event, ...] = ()


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The token chosen after one slice, with what was asked for beside it.

    Attributes:
        logits: vocab_size little-endian float32, or None.
    """

    token_id: int
    logprobs: PositionLogprobs | None = None
    logits: bytes | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step made.

    Attributes:
        samples: One entry per slice of the plan; None where nothing was or could be sampled.
        failed: Indices of the slices whose logits are not numbers: their KV is worth nothing.
        busy_s: From the beginning of its work on the device to the end, by the device's clock.
        gap_s: From the end of the step launched before to its beginning, by the same clock.
    """

    samples: tuple[SampledToken | None, ...]
    failed: frozenset[int] = frozenset()
    busy_s: float = 0.0
    gap_s: float = 0.0


class PendingStep(Protocol):
    """A step that has been launched."""

    def done(self) -> bool:
        """Returns True once `result` would not block; raises what the step raised."""

    def result(self) -> StepResult:
        """Blocks until the step is done; raises what the step raised."""
