"""Continuous batching of a modelled worker.

A step with prompts in it is one event. Steps that only decode are alike until a sequence ends or a
request comes, so a whole stretch of them is one event: a stretch is cut short after the step
during which something came. What the worker's batcher does otherwise is done here too: decodes
first, prompts in chunks beside them, by priority, wakes before new agents, first come first served.
A request takes the blocks of its whole answer when it begins to run, so none is ever preempted.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

from services.scheduler.simulation.clock import Events
from services.scheduler.simulation.mover import ModelSession
from services.scheduler.simulation.parameters import StepModel, WorkerParameters

_MARKS_KEPT = 4096


class ModelRequest:
    """One Generate on a modelled worker.

    Attributes:
        session: Whose.
        append_tokens: Tokens that it adds to the session's log.
        new_tokens: Tokens to generate.
        submitted_s: When the engine took it.
        on_done: Told once it has ended, or was cancelled.
        order: Its place in the order of service.
        prompt_tokens: Context and prompt together.
        cached_tokens: Of these, tokens whose KV was found.
        recomputed_tokens: Prompt tokens whose KV there had been before.
        started_s: When its first step began; None: not yet.
        first_token_s: When its first token was there; None: not yet.
        end_s: When its last token was there.
        deltas: (time, tokens) as they came; tokens of one stretch are one entry.
    """

    __slots__ = (
        "append_tokens",
        "cached_tokens",
        "deltas",
        "end_s",
        "first_token_s",
        "held_blocks",
        "joined",
        "joined_steps",
        "new_tokens",
        "on_done",
        "order",
        "prompt_tokens",
        "recomputed_tokens",
        "session",
        "started_s",
        "submitted_s",
    )

    def __init__(
        self,
        session: ModelSession,
        append_tokens: int,
        new_tokens: int,
        on_done: Callable[[ModelRequest], None],
    ) -> None:
        self.session = session
        self.append_tokens = append_tokens
        self.new_tokens = new_tokens
        self.on_done = on_done
        self.order: tuple[int, bool, int] = (0, False, 0)
        self.submitted_s = 0.0
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.recomputed_tokens = 0
        self.held_blocks = 0
        self.started_s: float | None = None
        self.first_token_s: float | None = None
        self.end_s = 0.0
        self.joined = 0
        self.joined_steps = 0
        self.deltas: list[tuple[float, int]] = []


class Batch:
    """The sequences that run, and the step they are in.

    Args:
        events: The time.
        parameters: The worker's.
        on_tokens: Told of a session whose KV has grown by a prompt.
        on_finished: Told of each request whose last token is there.
        on_step: Called at the end of each stretch, before the next one begins.
    """

    def __init__(
        self,
        events: Events,
        parameters: WorkerParameters,
        advance: Callable[[ModelRequest, int], None],
        on_finished: Callable[[ModelRequest], None],
        on_step: Callable[[], None],
    ) -> None:
        self.step_seconds = 0.0
        self.steps = 0
        self.prefilled_tokens = 0
        self.prefill_tokens_per_s = 0.0
        self._events = events
        self._times = StepModel(parameters)
        self._most_tokens = parameters.max_step_tokens
        self._beside = parameters.prompt_tokens_beside_decodes
        self._advance = advance
        self._on_finished = on_finished
        self._on_step = on_step
        # Requests with prompt tokens left, in order of service.
        self._prompts: list[tuple[tuple[int, bool, int], ModelRequest]] = []
        # By the step that gives the last token.
        self._decodes: list[tuple[int, tuple[int, bool, int], ModelRequest]] = []
        self._decode_context = 0
        # (steps done, when) at the end of each stretch, from which deltas are read.
        self._marks: list[tuple[int, float]] = []
        self._marks_dropped = 0
        self._stretch = 0
        self._stretch_start_s: float | None = None
        self._stretch_steps = 0
        self._step_s = 0.0
        self._chunks: list[tuple[ModelRequest, int]] = []

    @property
    def running(self) -> int:
        """Sequences that run."""
        return len(self._prompts) + len(self._decodes)

    def add(self, request: ModelRequest) -> None:
        """Lets a request run whose KV is on the device."""
        heapq.heappush(self._prompts, (request.order, request))

    def go_on(self) -> None:
        """Begins a step if none is under way, and cuts a stretch short if somebody waits for it."""
        if self._stretch_start_s is None:
            self._begin()
        elif self._prompts and self._stretch_steps > 1:
            self._cut()

    def _begin(self) -> None:
        now_s = self._events.now_s
        decodes = len(self._decodes)
        if not self._prompts:
            if not decodes:
                return
            steps = self._decodes[0][0] - self.steps
            read = self._decode_context + decodes * (steps + 1) / 2
            step_s = self._times.seconds(decodes, read)
        else:
            steps = 1
            step_s = self._chunk(decodes, now_s)
        self._stretch += 1
        self._stretch_start_s = now_s
        self._stretch_steps = steps
        self._step_s = step_s
        self._events.at(now_s + steps * step_s, self._end, self._stretch)

    def _chunk(self, decodes: int, now_s: float) -> float:
        """Chooses prompt chunks for one step and returns how long it takes."""
        budget = self._most_tokens
        if decodes:
            budget = min(budget, decodes + self._beside)
        left = max(1, budget - decodes)
        rows = decodes
        read = float(self._decode_context + decodes)
        pairs = 0.0
        for _, request in sorted(self._prompts):
            start = request.session.kv.tokens
            count = min(left, request.prompt_tokens - start)
            if request.started_s is None:
                self._start(request, start, now_s)
            self._chunks.append((request, count))
            rows += count
            read += start + count
            pairs += count * (start + count / 2)
            left -= count
            if not left:
                break
        return self._times.seconds(rows, read, pairs)

    @staticmethod
    def _start(request: ModelRequest, start: int, now_s: float) -> None:
        session = request.session
        request.started_s = now_s
        request.cached_tokens = start
        request.recomputed_tokens = max(0, session.known_tokens - start)
        held = session.kv.blocks - session.resident_blocks - session.loaded_blocks
        request.held_blocks = max(0, held)

    def _cut(self) -> None:
        """Has the stretch end with the step that runs now."""
        assert self._stretch_start_s is not None
        done = int((self._events.now_s - self._stretch_start_s) / self._step_s) + 1
        if done >= self._stretch_steps:
            return
        self._stretch += 1
        self._stretch_steps = done
        end_s = max(self._events.now_s, self._stretch_start_s + done * self._step_s)
        self._events.at(end_s, self._end, self._stretch)

    def _end(self, stretch: int) -> None:
        if stretch != self._stretch:
            return  # it was cut short
        now_s = self._events.now_s
        steps = self._stretch_steps
        self._stretch_start_s = None
        self.steps += steps
        self.step_seconds += steps * self._step_s
        self._decode_context += steps * len(self._decodes)
        self._marks.append((self.steps, now_s))
        while self._decodes and self._decodes[0][0] <= self.steps:
            self._finish(heapq.heappop(self._decodes)[2], now_s)
        if self._chunks:
            self._take_chunks(now_s)
        self._trim_marks()
        self._on_step()
        if self._stretch_start_s is None:
            self._begin()

    def _take_chunks(self, now_s: float) -> None:
        chunks, self._chunks = self._chunks, []
        tokens = sum(count for _, count in chunks)
        self.prefilled_tokens += tokens
        speed = tokens / self._step_s
        past = self.prefill_tokens_per_s
        self.prefill_tokens_per_s = 0.8 * past + 0.2 * speed if past else speed
        finished = []
        for request, count in chunks:
            end = request.session.kv.tokens + count
            self._advance(request, end)
            if end == request.prompt_tokens:
                request.first_token_s = now_s
                request.deltas.append((now_s, 1))
                finished.append(request)
        if not finished:
            return
        gone = set(map(id, finished))
        self._prompts = [entry for entry in self._prompts if id(entry[1]) not in gone]
        heapq.heapify(self._prompts)
        for request in finished:
            self._decode(request, now_s)

    def _decode(self, request: ModelRequest, now_s: float) -> None:
        left = request.new_tokens - 1
        if not left:
            request.end_s = now_s
            self._on_finished(request)
            return
        request.joined = self._marks_dropped + len(self._marks)
        request.joined_steps = self.steps
        self._decode_context += request.prompt_tokens
        heapq.heappush(self._decodes, (self.steps + left, request.order, request))

    def _finish(self, request: ModelRequest, now_s: float) -> None:
        done = request.joined_steps
        deltas = request.deltas
        for steps, time_s in self._marks[request.joined - self._marks_dropped :]:
            deltas.append((time_s, steps - done))
            done = steps
        request.end_s = now_s
        # The last token's own KV is never computed for it.
        context = request.prompt_tokens + request.new_tokens - 1
        self._decode_context -= context
        self._advance(request, context)
        self._on_finished(request)

    def _trim_marks(self) -> None:
        """Forgets marks that no running sequence will read."""
        if not self._decodes:
            self._marks_dropped += len(self._marks)
            self._marks.clear()
        elif len(self._marks) > _MARKS_KEPT:
            first = min(request.joined for _, _, request in self._decodes)
            del self._marks[: first - self._marks_dropped]
            self._marks_dropped = first
