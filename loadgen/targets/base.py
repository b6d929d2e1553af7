"""What the load generator needs of a system that serves agents.

A target is made in each client process. Everything is asynchronous and raises `TargetError` alone,
so that an agent's failure is always recorded with a reason.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable
from typing import Any, Protocol

import msgspec

from loadgen.record import KvFound
from loadgen.workload import Prompt


class TargetError(Exception):
    """A call failed.

    Attributes:
        reason: Stable upper-case name, the server's own where it gave one.
        message: One line.
        retry_after_s: When the server says to try again; None: it does not.
    """

    def __init__(self, reason: str, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason = reason
        self.message = message
        self.retry_after_s = retry_after_s


class TargetInfo(msgspec.Struct, frozen=True):
    """What a target serves.

    Attributes:
        vocab_size: Number of token ids.
        max_context_length: Most tokens of a context; 0: unknown.
        has_chat: Whether turns of a conversation can be sent.
        has_tokenizer: Whether text can be sent.
        model: All that it says of its model.
        policy: Its scheduling policy; empty: unknown.
    """

    vocab_size: int
    max_context_length: int
    has_chat: bool
    has_tokenizer: bool
    model: dict[str, Any]
    policy: str = ""


class Delta(msgspec.Struct, frozen=True):
    """Tokens as they arrive; their ids where the target tells them."""

    token_count: int
    text: str
    token_ids: tuple[int, ...] = ()


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """The end of a generation; see `record.RequestRecord` for the fields."""

    finish_reason: str
    prompt_tokens: int = 0
    cached_tokens: int = 0
    prefilled_tokens: int = 0
    queue_s: float | None = None
    kv: KvFound | None = None
    resends: int = 0


class Generation(Protocol):
    """One running generation: iterate to its end, then ask for the outcome."""

    def __aiter__(self) -> AsyncIterator[Delta]: ...

    async def outcome(self) -> Outcome: ...


class AgentSession(Protocol):
    """One agent's session."""

    @property
    def session_id(self) -> str: ...

    async def open(self) -> None: ...

    def generate(self, prompt: Prompt, max_tokens: int, timeout_s: float) -> Generation:
        """Appends to the session's context and generates; nothing is sent until iterated."""
        ...

    def tool_started(self, name: str, expected_s: float | None) -> Awaitable[None]:
        """Says at once that a tool runs; await what it returns for the answer."""
        ...

    def tool_ended(self) -> None:
        """Says that the tool has returned, without waiting for an answer."""
        ...

    async def close(self) -> None: ...


class Target(Protocol):
    """A connection to a system."""

    name: str

    async def info(self) -> TargetInfo: ...

    async def stats(self) -> dict[str, float]:
        """Returns counters and pools by name; empty if the system has none to show.

        ``report_time_s`` is the time that the counters are of and ``answer_time_s`` that of the
        answer, both on one clock of the system's; one that has them up to date leaves them out.
        """
        ...

    def session(self, name: str, tenant: str, first_prompt_tokens: int) -> AgentSession: ...

    async def aclose(self) -> None: ...
