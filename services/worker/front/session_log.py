"""What the front remembers of each session's tokens: how many, and which was the last.

It decides whether a text begins a session and whether a chat turn must close the one before. The
engine has the whole log and the last word on its length.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class SessionLog:
    """The end of one session's token log.

    Attributes:
        length: Tokens in the log.
        tail_start: Position of the first token of `tail`.
        tail: Tokens from there on, as far as they are known; may reach beyond `length` when a
            request was cut off.
    """

    length: int = 0
    tail_start: int = 0
    tail: list[int] = field(default_factory=list)

    def last_token(self) -> int | None:
        """Returns the log's last token; None if it is empty or the token is not known."""
        index = self.length - 1 - self.tail_start
        return self.tail[index] if 0 <= index < len(self.tail) else None

    def begin(self, prompt_length: int, last_prompt_token: int | None) -> None:
        """A request has put its prompt into the log, which now has this length and last token."""
        self.length = prompt_length
        self.tail = [] if last_prompt_token is None else [last_prompt_token]
        self.tail_start = prompt_length - len(self.tail)

    def extend(self, token_ids: list[int]) -> None:
        """A request has generated these tokens."""
        self.tail.extend(token_ids)
        self.length += len(token_ids)

    def cut(self, length: int) -> None:
        """The engine says that the log has this length."""
        self.length = length


class SessionLogs:
    """All sessions' logs, by session id."""

    def __init__(self) -> None:
        """Starts with none, as the engine does."""
        self._logs: dict[str, SessionLog] = {}

    def get(self, session_id: str) -> SessionLog | None:
        """Returns a session's log; None if the engine has not been given the session."""
        return self._logs.get(session_id)

    def ensure(self, session_id: str) -> SessionLog:
        """Returns a session's log, made empty if there is none."""
        return self._logs.setdefault(session_id, SessionLog())

    def forget(self, session_id: str) -> None:
        """Drops a session that was closed; does nothing if it is unknown."""
        self._logs.pop(session_id, None)

    def __len__(self) -> int:
        return len(self._logs)
