"""Continuous batching: which requests run, and what of each goes into the next step.

Decodes come first, so that no agent's tokens stall behind somebody's long prompt. What is left of
the step's token budget goes to prompts, in chunks: wakes before new agents, so that whoever comes
back with a tool's result is served ahead of who has just arrived.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from services.worker.engine.block import Block
from services.worker.engine.kv_mover import KvMover
from services.worker.engine.sequence import Request, Session
from services.worker.engine.step import SequenceSlice, StepPlan
from services.worker.engine.transfer import Priority

# A GPU takes about as long again for this many prompt tokens as for a batch of decodes, so agents
# that are generating barely notice.
_PROMPT_TOKENS_BESIDE_DECODES = 256


@dataclass(frozen=True, slots=True)
class Share:
    """What one session has in a step.

    Attributes:
        session: Whose.
        request: Which of its requests; by the step's end it may have another.
        start: Tokens computed before.
        count: Tokens computed by this step.
        filled: Blocks that this step fills.
    """

    session: Session
    request: Request
    start: int
    count: int
    filled: tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """A step's plan, and whose each slice is; both in the same order."""

    plan: StepPlan
    shares: tuple[Share, ...]


def service_order(session: Session) -> tuple[int, bool, int]:
    """Sort key of requests: by priority, wakes before new agents, first come first served."""
    assert session.request is not None
    return (-session.priority, not session.request.wake, session.request.arrival)


class Batcher:
    """Keeps the requests that wait and those that run.

    Args:
        mover: Brings and takes KV.
        max_running_sequences: Most sessions in a step.
        max_step_tokens: Most tokens in a step.
        make_room: Asked for this many available device blocks; may bring them later or never.
    """

    def __init__(
        self,
        mover: KvMover,
        max_running_sequences: int,
        max_step_tokens: int,
        make_room: Callable[[int], None],
    ) -> None:
        self.waiting: list[Session] = []
        self.running: list[Session] = []
        self.preemptions = 0
        self._mover = mover
        self._blocks = mover.blocks
        self._max_running = max_running_sequences
        self._max_tokens = max_step_tokens
        self._make_room = make_room

    def add(self, session: Session) -> None:
        """Queues a session's new request."""
        self.waiting.append(session)

    def remove(self, session: Session) -> None:
        """Takes a session's request out, wherever it is."""
        if session in self.running:
            self.running.remove(session)
        elif session in self.waiting:
            self.waiting.remove(session)

    def admit(self) -> None:
        """Lets waiting requests run whose KV is on the device, and starts loads for others.

        One that finds no room has those behind it give theirs up and bars them from taking more,
        so that none is overtaken for ever.
        """
        self.waiting.sort(key=service_order)
        promised = sum(self._lacking(session) for session in self.running)
        barred = False
        for session in list(self.waiting):
            if barred and not session.kv.held:
                continue
            own_blocks = len(session.kv.blocks)
            matched_tokens = self._match_prefix(session)
            need = promised + self._lacking(session)
            if not self._hold(session, need, own_blocks):
                # Blocks in a table that is not held cannot be reused: give the found ones back.
                self._blocks.drop(session.kv, own_blocks)
                barred = True
                continue
            session.count_prefix_hit(matched_tokens)
            promised = need
            if len(self.running) >= self._max_running or not self._blocks.loaded(session.kv):
                continue
            self.waiting.remove(session)
            self.running.append(session)

    def _hold(self, session: Session, more_blocks: int, own_blocks: int) -> bool:
        return self._find_room(
            attempt=lambda: self._mover.hold(session, Priority.WAKE, more_blocks, own_blocks),
            need=lambda: self._blocks.room_needed(session.kv, more_blocks),
            sacrifice=lambda: self._evict_waiting(session),
        )

    def _find_room(
        self, attempt: Callable[[], bool], need: Callable[[], int], sacrifice: Callable[[], bool]
    ) -> bool:
        """Tries until it succeeds, until room is sure to come, or until nobody can be sacrificed.

        Args:
            attempt: Takes the room if it is there.
            need: How many blocks must be available for it.
            sacrifice: Takes the blocks of somebody less urgent; False if there is nobody.
        """
        while not attempt():
            self._make_room(need())
            if attempt():
                return True
            if self._blocks.coming_device() >= need():
                return False  # as soon as the stores under way are done
            if not sacrifice():
                return False
        return True

    def _evict_waiting(self, session: Session) -> bool:
        """Evicts the last waiting session behind `session` that holds blocks."""
        behind = self._waiting_victims(service_order(session))
        if behind:
            self._mover.evict(behind[-1])
        return bool(behind)

    def _waiting_victims(self, after: tuple[int, bool, int]) -> list[Session]:
        """Returns waiting sessions that hold blocks and come after a place in the order."""
        return sorted(
            (
                session
                for session in self.waiting
                if session.kv.held
                and session.kv.blocks
                and not session.loading
                and service_order(session) > after
            ),
            key=service_order,
        )

    def schedule(self) -> Batch | None:
        """Returns the next step's batch; None if nothing can run.

        The shares' blocks have slots on the device; their tokens are not counted as computed yet.
        """
        self.running.sort(key=service_order)
        decodes = [session for session in self.running if session.remaining == 1]
        prompts = [session for session in self.running if session.remaining > 1]
        budget = self._max_tokens
        if decodes:
            budget = min(budget, len(decodes) + _PROMPT_TOKENS_BESIDE_DECODES)
        chosen: list[tuple[Session, int]] = []
        for session in decodes + prompts:
            if budget == 0:
                break
            if session not in self.running:
                continue  # preempted for one before it
            count = min(session.remaining, budget)
            if not self._reserve(session, count, [s for s, _ in chosen]):
                continue
            chosen.append((session, count))
            budget -= count
        if not chosen:
            return None
        return self._batch(chosen)

    def _batch(self, chosen: list[tuple[Session, int]]) -> Batch:
        slices = []
        shares = []
        for session, count in chosen:
            assert session.request is not None
            start = session.kv.tokens
            end = start + count
            slices.append(
                SequenceSlice(
                    token_ids=session.tokens[start:end],
                    start=start,
                    block_table=session.kv.slots[:],
                    sample=session.sample_request() if end == len(session.tokens) else None,
                )
            )
            filled = self._blocks.advance(session.kv, end)
            shares.append(Share(session, session.request, start, count, tuple(filled)))
        return Batch(StepPlan(tuple(slices)), tuple(shares))

    def _lacking(self, session: Session) -> int:
        """Returns how many new blocks the session's log, and one token more, will take."""
        return self._blocks.blocks_for(len(session.tokens) + 1) - len(session.kv.blocks)

    def _match_prefix(self, session: Session) -> int:
        if session.kv.held:
            return 0
        hashes = session.block_hashes(self._blocks.block_size_tokens)
        return self._blocks.match(session.kv, hashes, len(session.tokens) - 1)

    def _reserve(self, session: Session, count: int, scheduled: list[Session]) -> bool:
        """Gets slots for `count` more tokens, preempting others if there are none left."""
        tokens = session.kv.tokens + count
        return self._find_room(
            attempt=lambda: self._blocks.reserve(session.kv, tokens),
            need=lambda: self._blocks.blocks_for(tokens) - len(session.kv.blocks),
            sacrifice=lambda: self._evict_waiting(session) or self._preempt(session, scheduled),
        )

    def _preempt(self, session: Session, scheduled: list[Session]) -> bool:
        """Puts the last running session in the order of service back to wait.

        Returns:
            False if there is none, or if it was `session` itself.
        """
        victims = [s for s in self.running if s not in scheduled]
        if not victims:
            return False
        victim = max(victims, key=service_order)
        self.preemptions += 1
        self.running.remove(victim)
        self.waiting.append(victim)
        self._mover.evict(victim)
        return victim is not session
