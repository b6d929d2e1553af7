"""A session's bookkeeping in the engine, and that of the request it runs.

Pure Python: tokens and counters, no tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from services.worker.engine.block import BlockTable, CopyTicket, hash_blocks
from services.worker.engine.step import SampleRequest
from services.worker.messages import KvSource, Submit


@dataclass(eq=False, slots=True)
class Request:
    """One Generate on its way through the engine.

    Attributes:
        submit: What was asked.
        arrival: Counts requests; smaller came first.
        queued_ns: When the engine took it.
        prompt_length: Tokens of context before the first generated one.
        max_tokens: Most tokens to generate.
        wake: The session had KV when the request came, so an agent is waiting to go on.
        started: `Started` has been sent.
        prefilled_tokens: Prompt tokens computed for it.
        cached_tokens: Prompt tokens whose KV was found when it first ran.
        unaccepted: Tokens that launched steps sample and the log has not got yet.
    """

    submit: Submit
    arrival: int
    queued_ns: int
    prompt_length: int
    max_tokens: int
    wake: bool
    started: bool = False
    prefilled_tokens: int = 0
    cached_tokens: int = 0
    unaccepted: int = 0

    @property
    def request_id(self) -> str:
        """The front's name for it."""
        return self.submit.request_id


@dataclass(eq=False, slots=True)
class Session:
    """One agent's life in the engine.

    Attributes:
        session_id: Its name.
        hash_salt: What its blocks' hashes start from: model, layout and tenant.
        priority: Larger is served earlier.
        scheduler_record: Kept for the scheduler, not looked into.
        tokens: The token log: its truth, apart from its KV.
        hashes: Of the log's full blocks, as far as they were needed.
        kv: Its blocks.
        generation: Bumped at the start and at the end of every request.
        request: The one that runs or waits.
        last_request_id: Of the one that ended last; empty before.
        loading: Tickets that its blocks wait for.
        used_ns: When it was last held, ran or was told to wake.
        awaited_until_ns: Until then its blocks are for a wake that it was restored or prefetched
            for and that is still to come; 0: none is.
        last_generate_ns: End of its last request.
        known_tokens: Most tokens whose KV it has ever had of the present log.
        source: Where KV came from since its last request.
    """

    session_id: str
    hash_salt: bytes
    priority: int
    scheduler_record: bytes = b""
    tokens: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    kv: BlockTable = field(default_factory=BlockTable)
    generation: int = 0
    request: Request | None = None
    last_request_id: str = ""
    loading: set[CopyTicket] = field(default_factory=set)
    used_ns: int = 0
    awaited_until_ns: int = 0
    last_generate_ns: int | None = None
    known_tokens: int = 0
    source: KvSource = field(default_factory=KvSource)

    @property
    def length(self) -> int:
        """Tokens of the log, those included that launched steps sample."""
        return len(self.tokens) + (0 if self.request is None else self.request.unaccepted)

    @property
    def most_tokens(self) -> int:
        """Tokens of the log once its request has generated all it may."""
        assert self.request is not None
        return self.request.prompt_length + self.request.max_tokens

    @property
    def computable(self) -> int:
        """Tokens whose KV the next step can compute, at most.

        These are the known ones that have none. When all have, it is the one that a launched step
        samples, unless that is the last one wanted.
        """
        known = len(self.tokens) - self.kv.tokens
        length = self.length
        if length == self.most_tokens:
            return 0
        return known if known > 0 else length - self.kv.tokens

    @property
    def generated(self) -> int:
        """Tokens the present request has generated."""
        assert self.request is not None
        return len(self.tokens) - self.request.prompt_length

    def count_prefix_hit(self, tokens: int) -> None:
        """Counts tokens whose KV was found in the prefix index."""
        if tokens:
            self.source = msgspec.structs.replace(
                self.source, prefix_hit_tokens=self.source.prefix_hit_tokens + tokens
            )

    def common_prefix(self, context: list[int]) -> int:
        """Returns how many tokens the log and `context` share at their beginning."""
        low, high = 0, min(len(context), len(self.tokens))
        # Slices are compared at the speed of memory, so halving beats walking.
        while low < high:
            middle = (low + high + 1) // 2
            if self.tokens[low:middle] == context[low:middle]:
                low = middle
            else:
                high = middle - 1
        return low

    def cut(self, length: int, block_size_tokens: int) -> None:
        """Cuts the log to `length` tokens; the caller cuts the KV."""
        del self.tokens[length:]
        del self.hashes[length // block_size_tokens :]
        self.known_tokens = min(self.known_tokens, length)

    def block_hashes(self, block_size_tokens: int) -> list[bytes]:
        """Returns the hashes of the log's full blocks."""
        hash_blocks(self.tokens, block_size_tokens, self.hash_salt, self.hashes)
        return self.hashes

    def sample_request(self) -> SampleRequest:
        """Returns how to choose the token after the log and what launched steps add to it."""
        assert self.request is not None
        submit = self.request.submit
        return SampleRequest(
            params=submit.sampling,
            position=self.length,
            logprobs=submit.logprobs,
            return_logits=submit.return_logits,
        )
