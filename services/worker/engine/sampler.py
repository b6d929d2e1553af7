"""Chooses tokens from logits, repeatably.

A choice is a function of the seed, the token's position and the logits, whatever else is in the
batch, so that a generation resumed elsewhere goes on as it would have.

Tokens are drawn by the Gumbel-max trick: the token with the largest ``log p + g`` is distributed
as p if every g is an independent standard Gumbel variate. The variates come from a counter-based
generator: token t of a row uses output t of SplitMix64 (Steele, Lea and Flood, "Fast splittable
pseudorandom number generators", OOPSLA 2014) started at a key made of seed and position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from services.worker.engine.tensors import upload
from services.worker.messages import SamplingParams

_WORD = 1 << 64
_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """How to choose one token for each row of logits; host data.

    Attributes:
        params: How, row by row.
        positions: Position that each chosen token will have.
    """

    params: Sequence[SamplingParams]
    positions: Sequence[int]

    @property
    def greedy(self) -> bool:
        """True if every row takes its likeliest token."""
        return all(params.temperature == 0 for params in self.params)


def sample(logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """Chooses a token for each row.

    Args:
        logits: float32 ``[n, vocab_size]``; not changed.
        batch: How to choose.

    Returns:
        int64 ``[n]``; a row whose logits hold NaN gives -1.
    """
    likeliest, greedy = logits.max(dim=-1)
    if not batch.greedy:
        drawn = [i for i, params in enumerate(batch.params) if params.temperature > 0]
        rows = upload(np.array(drawn), logits.device)
        greedy[rows] = _draw(
            logits[rows], [batch.params[i] for i in drawn], [batch.positions[i] for i in drawn]
        )
    return torch.where(likeliest.isnan(), -1, greedy)


def sampled_buffer(rows: int, device: torch.device) -> torch.Tensor:
    """Returns where steps leave the tokens they sample for `follow`: int64 ``[rows + 1]``.

    Args:
        rows: Most tokens that a step samples.
        device: Where.
    """
    return torch.full((rows + 1,), -1, dtype=torch.int64, device=device)


def follow(token_ids: torch.Tensor, follows: torch.Tensor, sampled: torch.Tensor) -> torch.Tensor:
    """Fills in the tokens that the step before sampled.

    Args:
        token_ids: int64 ``[T]``, what the host knows; 0 where it does not.
        follows: int64 ``[T]``, rows of `sampled`; -1: the token is in `token_ids`.
        sampled: From `sampled_buffer`; -1 where sampling failed, and in its last row always.

    Returns:
        int64 ``[T]``, 0 in place of a token whose sampling failed.
    """
    return torch.maximum(token_ids, sampled[follows])


def _draw(
    logits: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int]
) -> torch.Tensor:
    device = logits.device
    temperature = upload(np.array([p.temperature for p in params], dtype=np.float64), device)
    scores = logits.double() / temperature[:, None]
    if any(p.top_k > 0 or p.top_p < 1 for p in params):
        scores = _truncate(scores, params)
    keys = [_signed(row_key(p.seed, place)) for p, place in zip(params, positions, strict=True)]
    uniform = _uniform(upload(np.array(keys), device), logits.shape[-1])
    return (scores - (-uniform.log()).log()).argmax(dim=-1)


def _truncate(scores: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Sets to -inf what top-k, and then top-p of what is left, rule out."""
    device, size = scores.device, scores.shape[-1]
    top_k = upload(np.array([p.top_k if p.top_k > 0 else size for p in params]), device)
    top_p = upload(np.array([p.top_p for p in params], dtype=np.float64), device)
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    beyond_k = torch.arange(size, device=device) >= top_k[:, None]
    ordered = ordered.masked_fill(beyond_k, -torch.inf)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    # The likeliest token is always allowed, and top_p of 1 rules nothing out by rounding.
    beyond_p = (before >= top_p[:, None]) & (top_p[:, None] < 1)
    beyond_p[:, 0] = False
    ordered = ordered.masked_fill(beyond_p, -torch.inf)
    return torch.empty_like(scores).scatter_(-1, order, ordered)


def row_key(seed: int, position: int) -> int:
    """Returns where a row's random numbers start: 64 bits of seed and position, well mixed."""
    return _mix(_mix(seed % _WORD + _GAMMA) + position * _GAMMA)


def _mix(word: int) -> int:
    word %= _WORD
    word = (word ^ (word >> 30)) * _MIX_1 % _WORD
    word = (word ^ (word >> 27)) * _MIX_2 % _WORD
    return word ^ (word >> 31)


def _uniform(keys: torch.Tensor, count: int) -> torch.Tensor:
    """Returns float64 ``[n, count]`` in (0, 1), of 52 random bits each."""
    index = torch.arange(1, count + 1, device=keys.device)
    word = keys[:, None] + index * _signed(_GAMMA)
    word = (word ^ _shift(word, 30)) * _signed(_MIX_1)
    word = (word ^ _shift(word, 27)) * _signed(_MIX_2)
    word ^= _shift(word, 31)
    return (_shift(word, 12).double() + 0.5) * 2.0**-52


def _shift(word: torch.Tensor, bits: int) -> torch.Tensor:
    """Shifts right as if int64 had no sign."""
    return (word >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    return word - _WORD if word >= _WORD // 2 else word
