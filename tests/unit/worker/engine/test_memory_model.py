"""Random sequences of all that can happen to sessions, in random interleavings of the streams.

Beside the engine runs a model of it that knows one thing: what each session's tokens are. Whatever
is evicted, restored, dropped or cancelled on the way, every generation must be the continuation of
those tokens, and after each action the bookkeeping must add up.
"""

from __future__ import annotations

from collections.abc import Sequence

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.worker.messages import (
    Abort,
    Action,
    Close,
    Drop,
    Evict,
    EvictMode,
    Mode,
    Open,
    Prefetch,
    Restore,
    SessionEvent,
    SessionEventKind,
    SetHint,
    SetMode,
    StopAt,
)
from tests.support.engine_harness import BLOCK, POISON, VOCAB, EngineHarness, continuation
from tests.support.manual_stream import ManualStream

NAMES = st.sampled_from(["a", "b", "c", "d", "e", "f"])
TOKENS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=3 * BLOCK)
ACTIONS: st.SearchStrategy[Action] = st.one_of(
    st.builds(Evict, mode=st.sampled_from(EvictMode), expected_wake_ns=st.integers(0, 9)),
    st.builds(SetHint, expected_wake_ns=st.integers(0, 9)),
    st.sampled_from([Restore(), Restore(), Prefetch(), Drop(), Close()]),
)
MODES = st.builds(Mode, st.booleans(), st.booleans(), st.booleans())
STREAMS = st.sampled_from(["compute", "load", "store"])


class MemoryMachine(RuleBasedStateMachine):
    """Six agents on pools that hold about three of them."""

    @initialize(
        host_blocks=st.sampled_from([0, 6, 10, 40]),
        write_through=st.booleans(),
        ahead_bytes=st.sampled_from([1, 1 << 20]),
        low_watermark=st.sampled_from([0.0, 0.2]),
    )
    def start(
        self, host_blocks: int, write_through: bool, ahead_bytes: int, low_watermark: float
    ) -> None:
        self.harness = EngineHarness(
            device_blocks=10,
            host_blocks=host_blocks,
            write_through=write_through,
            ahead_bytes=ahead_bytes,
            low_watermark=low_watermark,
            max_running=3,
            max_step_tokens=6,
            make_stream=ManualStream,
        )
        # What each session's log must be, kept apart from the engine's own.
        self.logs: dict[str, list[int]] = {}
        self.running: dict[str, tuple[str, list[int]]] = {}
        self.stops: dict[str, int] = {}
        self.stop_tokens: dict[str, int] = {}
        self.closed_requests: set[str] = set()
        self.commands: list[str] = []
        # Whose wake is to come: told to wake, and no request of theirs or eviction since.
        self.awake: set[str] = set()
        # Commands that restore each, since anything but restores last took device blocks.
        self.restores: dict[str, list[str]] = {}
        self.heard = 0

    # --- what can happen -------------------------------------------------------------------------

    @rule(name=NAMES, append=TOKENS, count=st.integers(1, 6))
    def generate(self, name: str, append: list[int], count: int) -> None:
        self._submit(name, self._log(name), append, count, full_context=None)

    @rule(name=NAMES, append=TOKENS, kept=st.integers(1, 5))
    def generate_to_a_stop_token(self, name: str, append: list[int], kept: int) -> None:
        log = self._log(name)
        stop = continuation([*log, *append], kept)[-1]
        self._submit(name, log, append, 6, full_context=None, stop_token=stop)

    @rule(name=NAMES)
    def generate_after_poison(self, name: str) -> None:
        self._submit(name, self._log(name), [POISON], 6, full_context=None)

    @rule(ahead=st.booleans())
    def change_the_pace(self, ahead: bool) -> None:
        self.harness.clock.ahead = ahead

    @rule(mode=MODES)
    def change_the_mode(self, mode: Mode) -> None:
        self.harness.engine.handle(SetMode(mode))

    @rule(name=NAMES, keep=st.integers(0, 40), append=TOKENS, count=st.integers(1, 6))
    def generate_from_a_cut_context(
        self, name: str, keep: int, append: list[int], count: int
    ) -> None:
        context = self._log(name)[:keep]
        self._submit(name, context, append, count, full_context=context)

    @rule(name=NAMES)
    def cancel(self, name: str) -> None:
        if name in self.running:
            self.harness.engine.handle(Abort(self.running[name][0]))

    @rule(name=NAMES, kept=st.integers(0, 3))
    def stop(self, name: str, kept: int) -> None:
        if name in self.running:
            request_id, context = self.running[name]
            length = len(context) + kept
            self.stops[name] = min(length, self.stops.get(name, length))
            self.harness.engine.handle(StopAt(request_id, name, length))

    @rule(name=NAMES, action=ACTIONS)
    def command(self, name: str, action: Action) -> None:
        if isinstance(action, Restore):
            self._restore(name)
            return
        self.commands.append(self.harness.command(name, action))
        if isinstance(action, Evict | Drop | Close):
            self.awake.discard(name)
            self.restores.pop(name, None)
        if isinstance(action, Close):
            self.commands.append(self.harness.command(name, Open()))
            self.logs[name] = []
            if name in self.running:
                self.closed_requests.add(self.running[name][0])

    @rule()
    def wake_more_than_fit(self) -> None:
        self.come_to_rest()
        names = "abc"
        self.every_generation_is_its_context_continued()
        for name in names:
            # Four blocks, and none of them another's.
            self._submit(name, [], [ord(name)] * (3 * BLOCK + 1), 1, full_context=[])
        self.come_to_rest()
        self.every_generation_is_its_context_continued()
        for name in names:
            self.command(name, Evict(EvictMode.RELEASE))
        self.come_to_rest()
        for name in names:
            self._restore(name)
        self.come_to_rest()

    @rule()
    def turn(self) -> None:
        self.harness.turn()
        if self.running:
            self.restores.clear()
        # As the scheduler does for an agent that computes and is not on the device.
        heard, self.heard = self.harness.heard[self.heard :], len(self.harness.heard)
        for message in heard:
            if isinstance(message, SessionEvent) and message.kind is SessionEventKind.EVICTED:
                name = message.session.session_id
                if name in self.awake and name not in self.running:
                    self._restore(name)

    @rule(name=STREAMS, pieces=st.integers(1, 3))
    def run_a_stream(self, name: str, pieces: int) -> None:
        self._stream(name).run(pieces)

    @precondition(lambda self: len(self.running) > 1)
    @rule()
    def come_to_rest(self) -> None:
        for _ in range(400):
            self.turn()
            if self.harness.engine.idle:
                return
            for name in ("store", "load", "compute"):
                self._stream(name).run()
        raise AssertionError("the engine never comes to rest")

    # --- what must be true -----------------------------------------------------------------------

    @invariant()
    def every_generation_is_its_context_continued(self) -> None:
        if not hasattr(self, "harness"):
            return
        for name, (request_id, context) in list(self.running.items()):
            found = self.harness.generation(request_id)
            assert found.tokens is not None
            poisoned = POISON in context
            assert found.tokens == ([] if poisoned else continuation(context, len(found.tokens)))
            assert self.stop_tokens.get(request_id) not in found.tokens[:-1]
            if found.finished is None and found.rejected is None:
                continue
            del self.running[name]
            stop = self.stops.pop(name, None)
            reason = None if found.rejected is None else found.rejected.error.reason
            if reason == "INTERNAL":
                assert poisoned
                self.logs[name] = context
            elif found.rejected is not None and reason != "CANCELLED":
                assert reason in ("CONTEXT_TOO_LONG", "SESSION_CLOSED")
            elif request_id not in self.closed_requests:
                self.logs[name] = (context + found.tokens)[:stop]

    @invariant()
    def every_log_is_what_was_said(self) -> None:
        if not hasattr(self, "harness"):
            return
        for name, session in self.harness.engine.sessions.items():
            if name not in self.running:
                assert session.tokens == self.logs.get(name, [])

    @invariant()
    def restores_do_not_take_each_others_blocks(self) -> None:
        if not hasattr(self, "harness"):
            return
        for commands in self.restores.values():
            results = [self.harness.done(command) for command in commands]
            assert sum(result is not None and result.moved_blocks > 0 for result in results) <= 1

    @invariant()
    def every_slot_is_accounted_for(self) -> None:
        if not hasattr(self, "harness"):
            return
        self.harness.engine.check_integrity()
        for pool in self.harness.blocks.pool_states():
            assert pool.free + pool.used + pool.reclaimable + pool.in_flight == pool.total
            assert min(pool.free, pool.used, pool.reclaimable, pool.in_flight) >= 0

    def teardown(self) -> None:
        if not hasattr(self, "harness"):
            return
        try:
            self.come_to_rest()
            self.every_generation_is_its_context_continued()
            assert not self.running
            # Each wake that is put off lets one restore more have its room.
            self.awake.clear()
            for _ in self.harness.engine.sessions:
                for session in self.harness.engine.sessions.values():
                    session.awaited_until_ns = 0
                self.come_to_rest()
            assert all(self.harness.done(command) is not None for command in self.commands)
        finally:
            self.harness.close()

    # --- helpers ---------------------------------------------------------------------------------

    def _submit(
        self,
        name: str,
        context: Sequence[int],
        append: list[int],
        count: int,
        full_context: Sequence[int] | None,
        stop_token: int | None = None,
    ) -> None:
        if name in self.running:
            return
        self.awake.discard(name)
        log = [*context, *append]
        request_id = self.harness.submit(
            name,
            append,
            max_tokens=count,
            full_context=full_context,
            stop=[] if stop_token is None else [stop_token],
        )
        self.running[name] = (request_id, log)
        if stop_token is not None:
            self.stop_tokens[request_id] = stop_token

    def _restore(self, name: str) -> None:
        command = self.harness.command(name, Restore())
        self.commands.append(command)
        if name in self.harness.engine.sessions and name not in self.running:
            self.awake.add(name)
            self.restores.setdefault(name, []).append(command)

    def _log(self, name: str) -> list[int]:
        return list(self.logs.get(name, []))

    def _stream(self, name: str) -> ManualStream:
        stream = self.harness.streams[name]
        assert isinstance(stream, ManualStream)
        return stream


TestMemory = MemoryMachine.TestCase
TestMemory.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
