"""What a target is told beside its address."""

from __future__ import annotations

import msgspec

DEFAULT_VOCAB_SIZE = 32_000
"""Nearly every model has at least as many token ids."""


class OpenAIOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How to speak to an OpenAI-compatible server.

    Attributes:
        model: The model's name there; empty: the first one that it lists.
        text: Send prompts as plain words of about the workload's lengths, not as token ids.
        vocab_size: Number of token ids that prompts are drawn from; its API does not tell.
    """

    model: str = ""
    text: bool = False
    vocab_size: int = DEFAULT_VOCAB_SIZE
