"""One session as the scheduler knows it, and the machine of its phases.

::

    OPEN ──COMPUTE──► COMPUTE ⇄ IO_WAIT        every one ──close──► CLOSED
      └────IO_WAIT─────────────────▲

A signal carries a sequence number that counts the session's signals. The one with the highest
number wins, whatever order they arrive in and however often: one that is late or repeated changes
nothing. Time is passed in; nothing here waits, sends or knows of workers' streams.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from services.common.errors import SessionClosedError
from services.scheduler.domain import NO_KV, Phase, Residency, SessionSnapshot
from services.scheduler.forecast import WakeForecast
from services.scheduler.pace import Pace


@dataclass(frozen=True, slots=True)
class Signal:
    """What a client says of its session.

    Attributes:
        phase: COMPUTE or IO_WAIT.
        sequence: Counts the session's signals from 1.
        tool_name: With IO_WAIT: the tool that started; empty: unnamed.
        expected_s: With IO_WAIT: how long the client thinks it takes; None: it does not know.
    """

    phase: Phase
    sequence: int
    tool_name: str = ""
    expected_s: float | None = None


@dataclass(frozen=True, slots=True)
class Waited:
    """A tool call that has ended, for the predictor to learn from."""

    tool_name: str
    expected_s: float | None
    duration_s: float


@dataclass(frozen=True, slots=True)
class Transition:
    """What a signal did.

    Attributes:
        applied: False if the signal was late or a repeat and changed nothing.
        waited: The tool call that the signal ended; None if none or if its end was not seen.
    """

    applied: bool
    waited: Waited | None = None


@dataclass(slots=True, eq=False)
class ClientStream:
    """A client's stream of phase signals.

    Attributes:
        ended_s: When it ended; None: it is open, so the client is there.
    """

    ended_s: float | None = None


@dataclass(slots=True)
class Session:
    """One session; its phase, its place and what its worker last said of it.

    Attributes:
        cache_salt: Blocks are shared only between sessions of the same salt.
        phase: Where the agent is.
        sequence: Of the signal that set `phase`; 0 before the first.
        phase_since_s: When `phase` was entered.
        signalled_s: When the last signal that was applied came; that of the opening before it.
        heard_s: When its client last spoke of it: also by a signal that was ignored.
        stream: The stream that its client signals on; None: it has used none.
        tool_name: The tool waited for; empty outside IO_WAIT.
        expected_s: The client's estimate for it; None: it gave none.
        expected_wake_s: When it is expected to wake, as its worker was last told; None: not
            waiting, or no idea.
        forecast: The whole distribution of that; None: as above, or it was lost with the scheduler
            that made it.
        pace: How its tool calls differ from others'.
        worker_id: Where it is placed; empty: nowhere.
        known: That worker, as it runs now, is known to hold the session.
        opening: An Open is on its way to that worker.
        generation: The worker's; 0 if not known.
        context_length: Tokens in the worker's copy of the log.
        kv: Where its KV lies, as last reported.
        generating: A Generate runs or waits.
        last_generate_s: End of the last Generate; None: none yet.
        move_id: Id of the command in flight that moves its KV; empty: none.
        deferred_trace: Trace context of a signal whose command cannot be sent yet.
        failures: Times in a row that a move has failed.
        evicted_s: When its device blocks were let go; None: they are held, or it is not known.
        prefetched: It was brought back ahead of its wake since it last ran or signalled.
        reason: Why the policy last did what it did about it, in a few words.
    """

    session_id: str
    tenant_id: str
    name: str
    priority: int
    cache_salt: str
    model: str
    opened_s: float
    phase: Phase = Phase.OPEN
    sequence: int = 0
    phase_since_s: float = 0.0
    signalled_s: float = 0.0
    heard_s: float = 0.0
    stream: ClientStream | None = None
    tool_name: str = ""
    expected_s: float | None = None
    expected_wake_s: float | None = None
    forecast: WakeForecast | None = None
    pace: Pace = field(default_factory=Pace)
    worker_id: str = ""
    known: bool = False
    opening: bool = False
    generation: int = 0
    context_length: int = 0
    kv: Residency = field(default=NO_KV)
    generating: bool = False
    last_generate_s: float | None = None
    move_id: str = ""
    deferred_trace: str = ""
    failures: int = 0
    evicted_s: float | None = None
    prefetched: bool = False
    reason: str = ""

    def __post_init__(self) -> None:
        if not self.phase_since_s:
            self.phase_since_s = self.opened_s
        if not self.signalled_s:
            self.signalled_s = self.phase_since_s
        if not self.heard_s:
            self.heard_s = self.signalled_s

    def apply(self, signal: Signal, now_s: float) -> Transition:
        """Takes a signal in.

        Args:
            signal: What the client said.
            now_s: The time.

        Returns:
            What changed.

        Raises:
            SessionClosedError: The session has ended.
        """
        if self.phase is Phase.CLOSED:
            raise closed_error(self.session_id)
        self.heard_s = now_s
        if signal.sequence <= self.sequence:
            return Transition(applied=False)
        waited = None
        # A gap in the numbers means that signals are missing between the two, and the time between
        # them is then not one tool call's.
        successive = signal.sequence == self.sequence + 1
        if self.phase is Phase.IO_WAIT and signal.phase is Phase.COMPUTE and successive:
            duration_s = max(0.0, now_s - self.phase_since_s)
            waited = Waited(self.tool_name, self.expected_s, duration_s)
        # A new stay in a phase comes from another one, or with another tool call.
        entered = signal.phase is not self.phase or signal.phase is Phase.IO_WAIT
        self.sequence = signal.sequence
        self.signalled_s = now_s
        self.phase = signal.phase
        if entered:
            self.phase_since_s = now_s
        waiting = signal.phase is Phase.IO_WAIT
        self.tool_name = signal.tool_name if waiting else ""
        self.expected_s = signal.expected_s if waiting else None
        self.expected_wake_s = None
        self.forecast = None
        self.prefetched = False
        return Transition(applied=True, waited=waited)

    def silent_since_s(self) -> float | None:
        """Returns since when there has been no sign that its client is still there.

        A tool call may take as long as the client said it would, and any time while the stream is
        open that the client signals on. None: what the session does now is a sign itself.
        """
        if self.generating:
            return None
        since_s = max(self.heard_s, self.last_generate_s or 0.0)
        if self.phase is Phase.IO_WAIT:
            if self.stream is not None:
                if self.stream.ended_s is None:
                    return None
                since_s = max(since_s, self.stream.ended_s)
            since_s = max(since_s, self.phase_since_s + (self.expected_s or 0.0))
        return since_s

    def close(self, now_s: float) -> None:
        """Ends the session; does nothing to one that has ended."""
        if self.phase is not Phase.CLOSED:
            self.phase = Phase.CLOSED
            self.phase_since_s = now_s
            self.tool_name = ""
            self.expected_s = None
            self.expected_wake_s = None
            self.forecast = None

    def observe(self, snapshot: SessionSnapshot) -> None:
        """Takes in what the session's own worker says of it."""
        self.known = True
        self.generation = snapshot.generation
        self.context_length = snapshot.context_length
        self.kv = snapshot.kv
        self.generating = snapshot.generating
        if snapshot.last_generate_s is not None:
            self.last_generate_s = snapshot.last_generate_s

    def forget_place(self) -> None:
        """Forgets all that only the worker knew, because that worker no longer holds it."""
        self.known = False
        self.opening = False
        self.generation = 0
        self.context_length = 0
        self.kv = NO_KV
        self.generating = False
        self.move_id = ""
        self.deferred_trace = ""
        self.failures = 0
        self.evicted_s = None
        self.prefetched = False


def closed_error(session_id: str, expired_after_s: float | None = None) -> SessionClosedError:
    """Returns the error for a session that has ended.

    Args:
        session_id: The session.
        expired_after_s: It was ended because nothing was heard of it for so long; None: it was
            closed.
    """
    metadata = {"session_id": session_id}
    if expired_after_s is None:
        return SessionClosedError(f"session {session_id!r} is closed", metadata=metadata)
    return SessionClosedError(
        f"session {session_id!r} has EXPIRED: nothing was heard of it for {expired_after_s:g} s",
        metadata={**metadata, "cause": "EXPIRED"},
    )
