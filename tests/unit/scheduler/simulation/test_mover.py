import math

from hypothesis import given, settings
from hypothesis import strategies as st

from services.scheduler.simulation.clock import Events
from services.scheduler.simulation.kv_model import NEVER_S
from services.scheduler.simulation.lanes import Urgency
from services.scheduler.simulation.mover import ModelSession, Mover
from tests.support.simulated import BLOCK_TOKENS, worker_parameters


class Rig:
    """A mover, its time, and some sessions."""

    def __init__(self, device: int, host: int, *, offload: bool = True) -> None:
        self.events = Events(0.0)
        self.mover = Mover(
            self.events, worker_parameters(device, host), lambda: None, offload=offload
        )
        self.kv = self.mover.kv
        self.made = 0

    def session(self, tokens: int = 0) -> ModelSession:
        self.made += 1
        session = ModelSession(f"s{self.made}", 0, b"")
        self.mover.add(session)
        if tokens:
            assert self.compute(session, tokens)
        return session

    def compute(self, session: ModelSession, tokens: int) -> bool:
        """Runs a request that adds `tokens` tokens; False if there is no room."""
        kv = session.kv
        more = self.kv.blocks_for(kv.tokens + tokens) - kv.blocks
        self.mover.hold(session, Urgency.WAKE, more)
        if kv.loading or kv.spare < more:
            return False
        self.kv.advance(kv, kv.tokens + tokens)
        self.mover.write_through(session)
        self.kv.trim(kv)
        self.kv.use(kv)
        self.kv.rest(kv)
        return True

    def settle(self) -> None:
        self.events.run(math.inf)


def test_full_blocks_are_stored_at_once_and_the_tail_by_an_eviction():
    rig = Rig(10, 10)
    session = rig.session(2 * BLOCK_TOKENS + 3)
    rig.settle()
    assert (session.kv.clean, session.kv.dirty) == (2, 1)
    rig.mover.evict(session)
    rig.settle()
    assert (session.kv.clean, session.kv.device, rig.kv.available()) == (3, 3, 10)


def test_an_evicted_session_takes_back_what_nobody_reused():
    rig = Rig(6, 10)
    first = rig.session(4 * BLOCK_TOKENS)
    rig.mover.evict(first)
    rig.settle()
    rig.session(3 * BLOCK_TOKENS)
    assert first.kv.device == 3
    assert not rig.mover.hold(first, Urgency.WAKE)
    evicted, dropped = rig.mover.make_room(rig.kv.room_needed(first.kv, 0), [])
    assert len(evicted) == 1
    assert not dropped
    rig.settle()
    assert rig.mover.hold(first, Urgency.WAKE)
    assert (first.resident_blocks, first.loaded_blocks) == (3, 1)
    assert first.kv.loading == 1
    rig.settle()
    assert first.kv.loading == 0
    assert rig.mover.counters.loaded_bytes == rig.mover.kv.block_size_tokens * (1 << 19)


def test_the_furthest_expected_wake_is_reused_first():
    rig = Rig(6, 20)
    near, far = rig.session(2 * BLOCK_TOKENS), rig.session(2 * BLOCK_TOKENS)
    for session, wake_s in ((near, 10.0), (far, 99.0)):
        rig.kv.set_wake(session.kv, wake_s)
        rig.mover.evict(session)
    rig.settle()
    rig.session(3 * BLOCK_TOKENS)
    assert (near.kv.device, far.kv.device) == (2, 1)
    rig.kv.set_wake(near.kv, NEVER_S)
    rig.session(1 * BLOCK_TOKENS)
    assert (near.kv.device, far.kv.device) == (1, 1)


def test_a_full_host_gives_up_copies_of_what_is_held_and_then_sessions():
    rig = Rig(8, 4)
    held = rig.session(4 * BLOCK_TOKENS)
    rig.settle()
    assert held.kv.clean == 4
    idle = rig.session(4 * BLOCK_TOKENS)
    rig.mover.evict(idle)
    rig.settle()
    assert (held.kv.clean, idle.kv.clean) == (0, 4)
    evicted, dropped = rig.mover.make_room(8, [])
    assert evicted == [held]
    # Of the two, both without an expected wake, it is the one that was used longer ago.
    assert dropped == [held]
    assert (held.kv.blocks, idle.kv.clean) == (0, 4)
    assert rig.kv.available() == 8


def test_without_a_host_tier_the_last_blocks_are_lost_with_their_reuse():
    rig = Rig(6, 10, offload=False)
    session = rig.session(4 * BLOCK_TOKENS)
    rig.mover.evict(session)
    assert rig.kv.available() == 6
    rig.session(3 * BLOCK_TOKENS)
    assert (session.kv.blocks, session.kv.tokens) == (3, 3 * BLOCK_TOKENS)
    assert rig.mover.counters.stores == 0


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(
            ["new", "compute", "evict", "restore", "prefetch", "drop", "forget", "wake", "room"]
        ),
        st.integers(0, 7),
        st.integers(1, 70),
        st.integers(0, 4),
    ),
    max_size=60,
)


@settings(deadline=None, max_examples=60)
@given(OPERATIONS, st.booleans(), st.integers(0, 30))
def test_whatever_happens_the_books_balance(operations, offload, host):
    rig = Rig(12, host, offload=offload)
    sessions: list[ModelSession] = []
    for name, which, number, time_steps in operations:
        if name == "new" or not sessions:
            sessions.append(rig.session())
        session = sessions[which % len(sessions)]
        match name:
            case "compute":
                rig.compute(session, number)
            case "evict":
                rig.mover.evict(session)
            case "restore":
                rig.mover.hold(session, Urgency.WAKE)
            case "prefetch":
                rig.mover.hold(session, Urgency.PREFETCH)
            case "drop":
                rig.mover.drop(session)
            case "forget":
                rig.mover.forget(session)
                sessions.remove(session)
            case "wake":
                rig.kv.set_wake(session.kv, float(number))
            case "room":
                rig.mover.make_room(number, [])
        rig.mover.check_integrity()
        rig.events.run(rig.events.now_s + time_steps * 1e-4)
        rig.mover.check_integrity()
    rig.settle()
    rig.mover.check_integrity()
    assert not rig.mover.loads.in_flight
    assert not rig.mover.stores.in_flight
