"""Continuous batching: which requests run, and what of each goes into the next step.

The next step is put together while one still runs: a sequence that decodes in both takes its token
from the one before, on the device.

Decodes come first, so that no agent's tokens stall behind somebody's long prompt. What is left of
the step's token budget goes to prompts, in chunks: wakes before new agents, so that whoever comes
back with a tool's result is served ahead of who has just arrived.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from services.worker.engine.block import Block
from services.worker.engine.kv_mover import KvMover
from services.worker.engine.room import Room
from services.worker.engine.sequence import Request, Session
from services.worker.engine.step import SequenceSlice, StepPlan
from services.worker.engine.step_clock import StepSize
from services.worker.engine.streams import Event
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
        samples: The step samples the token that follows.
    """

    session: Session
    request: Request
    start: int
    count: int
    filled: tuple[Block, ...]
    samples: bool


@dataclass(frozen=True, slots=True)
class Batch:
    """A step, and whose each slice is.

    Attributes:
        plan: The step.
        shares: Whose each of the plan's slices is.
        slice_of: Index of each request's slice.
        size: How much the step computes.
    """

    plan: StepPlan
    shares: tuple[Share, ...]
    slice_of: dict[Request, int]
    size: StepSize


def service_order(session: Session) -> tuple[int, bool, int]:
    """Sort key of requests: by priority, wakes before new agents, first come first served."""
    assert session.request is not None
    return (-session.priority, not session.request.wake, session.request.arrival)


class Batcher:
    """Keeps the requests that wait and those that run.

    Args:
        mover: Brings and takes KV.
        room: Where blocks come from when none are available.
        max_running_sequences: Most sessions in a step.
        max_step_tokens: Most tokens in a step.
    """

    def __init__(
        self,
        mover: KvMover,
        room: Room,
        max_running_sequences: int,
        max_step_tokens: int,
    ) -> None:
        self.waiting: list[Session] = []
        self.running: list[Session] = []
        self.preemptions = 0
        # Running, but the loads of their blocks may not have ended.
        self._early: set[Session] = set()
        # One that runs found no room for its next tokens when last asked.
        self._short = False
        self._mover = mover
        self._blocks = mover.blocks
        self._room = room
        self._max_running = max_running_sequences
        self._max_tokens = max_step_tokens

    def add(self, session: Session) -> None:
        """Queues a session's new request."""
        self.waiting.append(session)

    def remove(self, session: Session) -> None:
        """Takes a session's request out, wherever it is."""
        self._early.discard(session)
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
        self._room.owed = barred or (self._short and bool(self.running))

    def admit_early(self, is_soon: Callable[[float], bool]) -> None:
        """Lets the first request whose loads are about to end run, if nobody else does.

        Its step is launched at once and waits for the loads on the device, so that they end where
        it begins. Others would have to wait with it.

        Args:
            is_soon: Told how many seconds the loads go on; decides.
        """
        if self.running:
            return
        for session in self.waiting:
            if session.kv.held and session.loading and is_soon(self._mover.loading_s(session)):
                self.waiting.remove(session)
                self.running.append(session)
                self._early.add(session)
                return

    def _hold(self, session: Session, more_blocks: int, own_blocks: int) -> bool:
        return self._room.find(
            attempt=lambda: self._mover.hold(session, Priority.WAKE, more_blocks, own_blocks),
            need=lambda: self._blocks.room_needed(session.kv, more_blocks),
            waiting=self.waiting,
            sacrifice=lambda: self._evict_waiting(session),
        )

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

    def next_size(self) -> StepSize | None:
        """Returns how much the next step will compute if there is room; None if it is nothing."""
        counts = [count for session in self.running if (count := session.computable)]
        if not counts:
            return None
        decodes = counts.count(1)
        room = max(self._budget(decodes) - decodes, 0)
        kv_tokens = sum(session.length for session in self.running)
        return StepSize(decodes, min(sum(counts) - decodes, room), kv_tokens)

    def schedule(self, previous: Batch | None) -> Batch | None:
        """Returns the next step's batch; None if nothing can run.

        The shares' blocks have slots on the device; their tokens are counted as computed, so the
        step must be launched.

        Args:
            previous: The batch launched last, if its step is not collected yet.
        """
        self.running.sort(key=service_order)
        self._short = False
        counts = [(session, session.computable) for session in self.running]
        decodes = [(session, count) for session, count in counts if count == 1]
        prompts = [(session, count) for session, count in counts if count > 1]
        budget = self._budget(len(decodes))
        chosen: list[tuple[Session, int]] = []
        for session, most in decodes + prompts:
            if budget == 0:
                break
            if session not in self.running:
                continue  # preempted for one before it
            count = min(most, budget)
            if not self._reserve(session, count, chosen):
                self._short = self._room.owed = True
                continue
            chosen.append((session, count))
            budget -= count
        if not chosen:
            return None
        return self._batch(chosen, {} if previous is None else previous.slice_of)

    def _budget(self, decodes: int) -> int:
        """Returns how many tokens a step with so many decodes may have."""
        if not decodes:
            return self._max_tokens
        return min(self._max_tokens, decodes + _PROMPT_TOKENS_BESIDE_DECODES)

    def _batch(
        self, chosen: list[tuple[Session, int]], sampled_before: dict[Request, int]
    ) -> Batch:
        slices = []
        shares = []
        after: list[Event] = []
        kv_tokens = 0
        for session, count in chosen:
            request = session.request
            assert request is not None
            start = session.kv.tokens
            end = start + count
            known = start < len(session.tokens)
            samples = end == session.length
            slices.append(
                SequenceSlice(
                    token_ids=session.tokens[start:end] if known else [0],
                    start=start,
                    block_table=session.kv.slots[:],
                    sample=session.sample_request() if samples else None,
                    follows=None if known else sampled_before[request],
                )
            )
            request.unaccepted += samples
            if session in self._early:
                self._early.remove(session)
                after += self._mover.load_events(session, 1)[0]
            filled = self._blocks.advance(session.kv, end)
            shares.append(Share(session, request, start, count, tuple(filled), samples))
            kv_tokens += end
        decodes = sum(count == 1 for _, count in chosen)
        tokens = sum(count for _, count in chosen)
        return Batch(
            StepPlan(tuple(slices), tuple(after)),
            tuple(shares),
            {share.request: index for index, share in enumerate(shares)},
            StepSize(decodes, tokens - decodes, kv_tokens),
        )

    def _lacking(self, session: Session) -> int:
        """Returns how many new blocks the session's log, and one token more, will take."""
        tokens = min(session.length + 1, session.most_tokens)
        return self._blocks.blocks_for(tokens) - len(session.kv.blocks)

    def _match_prefix(self, session: Session) -> int:
        if session.kv.held or not self._mover.mode.share_prefixes:
            return 0
        hashes = session.block_hashes(self._blocks.block_size_tokens)
        return self._blocks.match(session.kv, hashes, len(session.tokens) - 1)

    def _reserve(self, session: Session, count: int, chosen: list[tuple[Session, int]]) -> bool:
        """Gets slots for `count` more tokens, preempting others if there are none left."""
        tokens = session.kv.tokens + count
        return self._room.find(
            attempt=lambda: self._blocks.reserve(session.kv, tokens),
            need=lambda: self._blocks.blocks_for(tokens) - len(session.kv.blocks),
            waiting=self.waiting,
            sacrifice=lambda: self._evict_waiting(session) or self._preempt(session, chosen),
        )

    def _preempt(self, session: Session, chosen: list[tuple[Session, int]]) -> bool:
        """Puts the last running session in the order of service back to wait.

        A token that a launched step samples for it still comes.

        Returns:
            False if there is none, or if it was `session` itself.
        """
        scheduled = {session for session, _ in chosen}
        victims = [session for session in self.running if session not in scheduled]
        if not victims:
            return False
        victim = max(victims, key=service_order)
        self.preemptions += 1
        self.remove(victim)
        self.waiting.append(victim)
        self._mover.evict(victim)
        return victim is not session
