"""Prompts that one worker has to compute, as far as the scheduler can know."""

from __future__ import annotations

PATIENCE_S = 10.0
"""How long a session that was let in is waited for to send its prompt."""

ASSUMED_TOKENS = 512
"""What a first prompt of unknown length is counted for before any has been seen."""

_MEMORY = 0.1


class Prompts:
    """Tokens to prefill, by session.

    A session counts from when it is let in, or wakes without KV, until its prompt is computed or
    its Generate has ended.

    Attributes:
        tokens: Of all together.
        typical_tokens: What a first prompt of unknown length is counted for: the mean of those
            seen, of late ones above all.
    """

    __slots__ = ("_by_session", "_first_seen", "tokens", "typical_tokens")

    def __init__(self) -> None:
        self.tokens = 0
        self.typical_tokens = ASSUMED_TOKENS
        self._first_seen = 0
        self._by_session: dict[str, tuple[int, float, bool]] = {}

    def begin(self, session_id: str, tokens: int, now_s: float) -> None:
        """Notes that a session has a prompt to be computed, in place of any it had."""
        self.end(session_id)
        self._by_session[session_id] = (tokens, now_s, False)
        self.tokens += tokens

    def started(self, session_id: str, first_tokens: int = 0) -> None:
        """Notes that a session's prompt has arrived, so that it is no longer waited for.

        Args:
            session_id: Whose.
            first_tokens: How long it is, if it is the session's first; 0: it is not.
        """
        if first_tokens:
            self._first_seen += 1
            weight = max(_MEMORY, 1 / self._first_seen)
            self.typical_tokens += round(weight * (first_tokens - self.typical_tokens))
        entry = self._by_session.get(session_id)
        if entry is not None:
            tokens = first_tokens or entry[0]
            self.tokens += tokens - entry[0]
            self._by_session[session_id] = (tokens, entry[1], True)

    def computed(self, tokens: int) -> None:
        """Notes that the worker has computed so many, of those that have arrived the oldest."""
        for session_id, (waiting, since_s, started) in list(self._by_session.items()):
            if tokens <= 0:
                return
            if started:
                self.end(session_id)
                if waiting > tokens:
                    self._by_session[session_id] = (waiting - tokens, since_s, True)
                    self.tokens += waiting - tokens
                tokens -= waiting

    def end(self, session_id: str) -> bool:
        """Notes that a session has no prompt to compute; returns whether it had one."""
        entry = self._by_session.pop(session_id, None)
        if entry is None:
            return False
        self.tokens -= entry[0]
        return True

    def expire(self, now_s: float) -> None:
        """Forgets those that have not arrived in time; they count as computed once they do."""
        late = [
            session_id
            for session_id, (_, since_s, started) in self._by_session.items()
            if not started and now_s - since_s > PATIENCE_S
        ]
        for session_id in late:
            self.end(session_id)
