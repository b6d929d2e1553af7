"""Whatever happens in whatever order, once all is quiet the KV lies where the phases say."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.common.errors import DjinnError
from services.scheduler.config import SchedulerConfig
from services.scheduler.coordinator import Coordinator, OpenRequest
from services.scheduler.domain import EventKind, Phase
from services.scheduler.session import Signal
from tests.support.model_worker import ModelWorker

NAMES = ("a", "b", "c")
CONFIG = SchedulerConfig(worker_silence_s=1e9, command_timeout_s=5.0)

names = st.sampled_from(NAMES)
delays = st.floats(0.0, 3.0)


class Lives(RuleBasedStateMachine):
    """Agents, one scheduler that is killed now and then, and two workers that are too."""

    @initialize()
    def begin(self) -> None:
        self.now_s = 1000.0
        self.coordinator = Coordinator(CONFIG, self.now_s)
        self.workers = [
            ModelWorker(self.coordinator, f"w{number}").connect(self.now_s) for number in range(2)
        ]
        self.sequences = dict.fromkeys(NAMES, 0)
        self.phases: dict[str, Phase] = {}
        self.tokens: dict[str, bytes] = {}
        self.closed: set[str] = set()

    # --- what the world does ---

    @rule(name=names)
    def open(self, name: str) -> None:
        if name in self.closed:
            return
        try:
            session = self.coordinator.open_session(OpenRequest(name), self.now_s)
        except DjinnError as error:
            assert error.reason == "NO_WORKER"  # noqa: PT017 - which of them it is depends
            return
        self.phases.setdefault(name, Phase.OPEN)
        self.tokens[name] = self.coordinator.token(session)

    @precondition(lambda self: self.tokens)
    @rule(name=names, phase=st.sampled_from([Phase.COMPUTE, Phase.IO_WAIT]), skip=st.integers(1, 2))
    def signal(self, name: str, phase: Phase, skip: int) -> None:
        if name not in self.tokens or name in self.closed:
            return
        self.sequences[name] += skip
        self.phases[name] = phase
        self.say(name, phase, self.sequences[name])

    @precondition(lambda self: self.tokens)
    @rule(name=names, phase=st.sampled_from([Phase.COMPUTE, Phase.IO_WAIT]), late=st.integers(0, 3))
    def signal_late(self, name: str, phase: Phase, late: int) -> None:
        sequence = self.sequences[name] - late
        if name not in self.tokens or name in self.closed or sequence < 1:
            return
        if self.coordinator.store.get(name) is None:
            # A scheduler that has forgotten the session believes whatever it hears first.
            return
        if late == 0:
            phase = self.phases[name]
        self.say(name, phase, sequence)

    @rule(name=names)
    def start_generate(self, name: str) -> None:
        worker = self.home(name)
        if worker is None or any(
            w.sessions[name].generating for w in self.workers if name in w.sessions
        ):
            return
        worker.start_generate(name, self.now_s, self.tokens[name])

    @rule(name=names)
    def finish_generate(self, name: str) -> None:
        for worker in self.workers:
            session = worker.sessions.get(name)
            if session is not None and session.generating:
                worker.finish_generate(name, self.now_s)

    @rule(number=st.integers(0, 1), name=names)
    def evict_for_room(self, number: int, name: str) -> None:
        worker = self.workers[number]
        session = worker.sessions.get(name)
        if session is None or session.generating or not session.kv.resident:
            return
        kv = session.kv._replace(resident=False, host_blocks=session.kv.total_blocks)
        worker.sessions[name] = type(session)(
            name,
            session.generation,
            session.context_length,
            kv,
            False,
            session.record,
            session.last_generate_s,
        )
        worker.happen(EventKind.EVICTED, name, self.now_s)

    @rule(number=st.integers(0, 1), most=st.integers(1, 3))
    def carry_out(self, number: int, most: int) -> None:
        if self.workers[number].connected:
            self.workers[number].work(self.now_s, most)

    @rule(seconds=delays)
    def wait(self, seconds: float) -> None:
        until_s = self.now_s + seconds
        while (due_s := self.coordinator.next_due_s()) <= until_s:
            self.now_s = max(self.now_s, due_s)
            self.coordinator.advance(self.now_s)
        self.now_s = until_s

    @rule(number=st.integers(0, 1))
    def lose_worker(self, number: int) -> None:
        if self.workers[number].connected:
            self.workers[number].lose(self.now_s)

    @rule(number=st.integers(0, 1), anew=st.booleans())
    def worker_returns(self, number: int, anew: bool) -> None:
        worker = self.workers[number]
        if worker.connected:
            return
        if anew:
            worker.restart()
        worker.connect(self.now_s)

    @rule()
    def kill_scheduler(self) -> None:
        self.coordinator = Coordinator(CONFIG, self.now_s)
        for worker in self.workers:
            was = worker.connected
            worker.connected = False
            worker.coordinator = self.coordinator
            if was:
                worker.connect(self.now_s)
        # A client that sees the epoch change says its phase again.
        for name, sequence in self.sequences.items():
            if sequence and name in self.tokens and name not in self.closed:
                self.say(name, self.phases[name], sequence)

    @rule(name=names)
    def close(self, name: str) -> None:
        if name not in self.tokens:
            return
        self.closed.add(name)
        self.coordinator.close_session(name, self.now_s)

    # --- what must hold ---

    @invariant()
    def phases_are_counted_right(self) -> None:
        store = self.coordinator.store
        for phase in Phase:
            assert store.count(phase) == sum(s.phase is phase for s in store)

    @invariant()
    def every_session_is_counted_on_its_worker_alone(self) -> None:
        for state in self.coordinator.registry:
            for session_id in state.sessions:
                session = self.coordinator.store.get(session_id)
                assert session is not None
                assert session.worker_id == state.hello.worker_id

    @rule()
    def all_comes_to_rest_where_the_phases_say(self) -> None:
        for worker in self.workers:
            if not worker.connected:
                worker.connect(self.now_s)
        for name in NAMES:
            self.finish_generate(name)
        for _ in range(40):
            self.wait(3.0)
            for worker in self.workers:
                worker.work(self.now_s)
        assert len(self.coordinator.reconciler) == 0
        for name in self.closed:
            assert not any(
                name in worker.sessions for worker in self.workers
            ) or not self.coordinator.store.is_closed(name)
        for name, phase in self.phases.items():
            self.at_rest(name, phase)

    def at_rest(self, name: str, phase: Phase) -> None:
        session = self.coordinator.store.get(name)
        if session is None or name in self.closed:
            return
        assert session.sequence == self.sequences[name]
        assert session.phase is (phase if self.sequences[name] else Phase.OPEN)
        assert not session.move_id
        home = next(worker for worker in self.workers if worker.worker_id == session.worker_id)
        if not session.known:
            return
        held = home.sessions[name]
        assert (session.generation, session.kv) == (held.generation, held.kv)
        # After 120 quiet seconds a session in COMPUTE counts as idle too.
        assert not held.kv.resident
        others = [worker for worker in self.workers if worker is not home]
        assert not any(name in worker.sessions for worker in others)

    # --- helpers ---

    def say(self, name: str, phase: Phase, sequence: int) -> None:
        outcome = self.coordinator.signal(
            name, Signal(phase, sequence), self.now_s, token=self.tokens[name]
        )
        assert outcome.session.sequence == self.sequences[name]
        assert outcome.session.phase is self.phases[name]

    def home(self, name: str) -> ModelWorker | None:
        if name not in self.tokens or name in self.closed:
            return None
        session = self.coordinator.store.get(name)
        if session is None:
            return None
        for worker in self.workers:
            if worker.worker_id == session.worker_id and worker.connected:
                return worker
        return None


Lives.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestLives = Lives.TestCase
