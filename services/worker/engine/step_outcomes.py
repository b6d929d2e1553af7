"""What steps make of requests: told when one starts, tokens and ends when a step is done."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from services.common.errors import InternalError
from services.worker.engine import requests
from services.worker.engine.batcher import Batch, Share
from services.worker.engine.kv_mover import KvMover
from services.worker.engine.step import SampledToken, StepResult
from services.worker.messages import Started, Tokens

if TYPE_CHECKING:
    from services.worker.engine.engine import Engine

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Tally:
    """What has been done since the start; `djinn.v1.WorkerCounters` has the meanings."""

    prefilled_tokens: int = 0
    recomputed_tokens: int = 0
    prefix_hit_tokens: int = 0
    generated_tokens: int = 0
    requests_completed: int = 0
    requests_failed: int = 0
    requests_cancelled: int = 0


class StepOutcomes:
    """Takes in what the steps of an engine give.

    Args:
        engine: Whose sessions.
        mover: Moves their KV.
        tally: Mutated.

    Attributes:
        prefill_tokens_per_s: Of late; 0 at first.
    """

    def __init__(self, engine: Engine, mover: KvMover, tally: Tally) -> None:
        self.prefill_tokens_per_s = 0.0
        self._engine = engine
        self._mover = mover
        self._blocks = mover.blocks
        self._tally = tally
        # Requests whose first step is launched, with that time, and of which nobody was told.
        self._starting: list[tuple[Share, int]] = []

    @property
    def untold(self) -> bool:
        """True if a request's first step was launched while its KV was still being loaded."""
        return bool(self._starting)

    def begin(self, batch: Batch) -> None:
        """Notes that a batch is about to be launched, and tells of the requests that start."""
        now_ns = time.time_ns()
        for share in batch.shares:
            request = share.request
            if not request.started:
                request.started = True
                request.cached_tokens = share.start
                self._starting.append((share, now_ns))
        self.tell_started()

    def tell_started(self, done: Batch | None = None) -> None:
        """Tells of the requests that have started.

        Where KV came from, and when, is known once its loads have ended: until then it waits.

        Args:
            done: Those of this batch wait no longer, for their tokens come next.
        """
        starting, self._starting = self._starting, []
        for share, started_ns in starting:
            session, request = share.session, share.request
            if session.request is not request:
                continue  # it ended before
            if session.loading and (done is None or request not in done.slice_of):
                self._starting.append((share, started_ns))
            else:
                self._tell_started(share, started_ns)

    def _tell_started(self, share: Share, started_ns: int) -> None:
        session, request = share.session, share.request
        source = session.source
        before = self._blocks.blocks_for(share.start)
        prefix_blocks = source.prefix_hit_tokens // self._blocks.block_size_tokens
        held = before - source.resident_blocks - source.loaded_blocks - prefix_blocks
        self._tally.prefix_hit_tokens += source.prefix_hit_tokens
        self._engine.outbox.append(
            Started(
                request_id=request.request_id,
                context_length=request.prompt_length,
                cached_tokens=share.start,
                generation=session.generation,
                kv=msgspec.structs.replace(
                    source,
                    held_blocks=max(held, 0),
                    recomputed_tokens=max(session.known_tokens - share.start, 0),
                ),
                queued_ns=request.queued_ns,
                started_ns=started_ns,
            )
        )

    def take(self, batch: Batch, result: StepResult) -> None:
        """Takes in a step that is done; who waits for a first token comes first."""
        self.tell_started(done=batch)
        prefilled = 0
        order = sorted(range(len(batch.shares)), key=lambda i: batch.shares[i].count == 1)
        for index in order:
            share = batch.shares[index]
            if index in result.failed:
                self._fail_share(share)
            else:
                prefilled += self._take_share(share, result.samples[index])
        if prefilled and result.busy_s:
            speed = prefilled / result.busy_s
            past = self.prefill_tokens_per_s
            self.prefill_tokens_per_s = 0.8 * past + 0.2 * speed if past else speed

    def _fail_share(self, share: Share) -> None:
        """Fails a request whose logits are not numbers, and forgets the KV that they come from."""
        session = share.session
        if session.request is not share.request:
            return
        self._mover.discard(session)
        message = f"the logits after {share.start + share.count} tokens are not numbers"
        _log.error("session %s: %s", session.session_id, message)
        self._engine.fail(session, InternalError(message))

    def _take_share(self, share: Share, sample: SampledToken | None) -> int:
        """Takes in one session's part of a step; returns how many prompt tokens it computed."""
        session, request = share.session, share.request
        end = share.start + share.count
        prompt_tokens = max(0, min(end, request.prompt_length) - share.start)
        self._tally.prefilled_tokens += prompt_tokens
        self._tally.recomputed_tokens += max(0, min(end, session.known_tokens) - share.start)
        request.prefilled_tokens += prompt_tokens
        self._publish(share)
        if session.request is not request:
            return prompt_tokens  # it ended while the step was in flight
        session.known_tokens = max(session.known_tokens, end)
        if sample is not None:
            self._tally.generated_tokens += 1
            reason = requests.accept_token(session, sample.token_id)
            self._engine.outbox.append(
                Tokens(
                    request_id=request.request_id,
                    token_ids=[sample.token_id],
                    logprobs=[] if sample.logprobs is None else [sample.logprobs],
                    logits=[] if sample.logits is None else [sample.logits],
                    collected_ns=time.time_ns(),
                )
            )
            if reason is not None:
                self._engine.finish(session, reason)
        return prompt_tokens

    def _publish(self, share: Share) -> None:
        """Lets others find the blocks that a step has filled, unless they were cut off since."""
        if not share.filled or not self._mover.mode.share_prefixes:
            return
        session, size = share.session, self._blocks.block_size_tokens
        blocks = session.kv.blocks
        for index, block in enumerate(share.filled, start=share.start // size):
            if index < len(blocks) and blocks[index] is block:
                self._blocks.publish(session.kv, index, session.block_hashes(size)[index])
