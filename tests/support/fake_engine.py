"""An engine process without a model: speaks `messages`, echoes prompts, obeys magic tokens.

A request's i-th token is the i-th of its appended tokens, over and over. A magic token in what is
appended makes the engine misbehave in one way.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field

import zmq

from services.common.errors import (
    CancelledError,
    ContextMismatchError,
    ContextTooLongError,
    DjinnError,
    ErrorInfo,
    InternalError,
    SessionBusyError,
    StaleGenerationError,
    UnknownSessionError,
)
from services.worker import messages
from services.worker.config import EngineConfig

VOCAB_SIZE = 400
CONTEXT_LIMIT = 1000
BLOCK_TOKENS = 16

CRASH = 390
"""Ends the process at once, with exit code 3."""
BUG = 391
"""Reports a failure with a traceback and ends with exit code 1."""
HANG = 392
"""Starts the request and makes no token, until it is aborted or stopped."""
REFUSE = 393
"""Refuses the request as a bug."""
FLOOD = 394
"""Makes all tokens in one message."""


@dataclass
class _Session:
    session_id: str
    tokens: list[int] = field(default_factory=list)
    generation: int = 0
    record: bytes = b""
    resident: bool = True
    running: str | None = None
    last_ns: int | None = None

    def state(self) -> messages.SessionState:
        return messages.SessionState(
            self.session_id,
            self.generation,
            len(self.tokens),
            self.residency(),
            self.running is not None,
            self.record,
            self.last_ns,
        )

    def residency(self) -> messages.Residency:
        blocks = -(-len(self.tokens) // BLOCK_TOKENS)
        return messages.Residency(blocks, blocks, blocks, 0, self.resident)


@dataclass
class _Request:
    submit: messages.Submit
    session: _Session
    prompt_length: int
    made: int = 0

    @property
    def wanted(self) -> int:
        if self.submit.max_tokens is not None:
            return self.submit.max_tokens
        return CONTEXT_LIMIT - self.prompt_length


class FakeEngine:
    """The state of a fake engine, and how messages change it."""

    def __init__(self) -> None:
        self.sessions: dict[str, _Session] = {}
        self.requests: dict[str, _Request] = {}
        self.out: list[messages.ToFront] = []
        self.stopping = False
        self.submits = 0
        self.commands: list[str] = []
        self.cancelled = 0

    def handle(self, message: messages.ToEngine) -> None:
        match message:
            case messages.Submit():
                self.submits += 1
                try:
                    self._submit(message)
                except DjinnError as refusal:
                    self.out.append(messages.Rejected(message.request_id, refusal.to_info()))
            case messages.Abort():
                request = self.requests.pop(message.request_id, None)
                if request is not None:
                    self.cancelled += 1
                    cancelled = CancelledError("cancelled")
                    self.out.append(messages.Rejected(message.request_id, cancelled.to_info()))
                    self._leave(request)
            case messages.StopAt():
                request = self.requests.get(message.request_id)
                if request is not None:
                    del request.session.tokens[message.context_length :]
                    self._finish(request, messages.FinishReason.STOP)
            case messages.Command():
                self.commands.append(message.command_id)
                self.out.append(self._command(message))
            case messages.GetSnapshot():
                states = [session.state() for session in self.sessions.values()]
                self.out.append(messages.Snapshot(message.snapshot_id, states))
            case messages.Shutdown():
                self.stopping = True

    def turn(self) -> None:
        """Makes a token for each request."""
        for request in list(self.requests.values()):
            echo = request.submit.append or request.submit.full_context or request.session.tokens
            if HANG in echo:
                continue
            count = request.wanted if FLOOD in echo else 1
            ids = [echo[(request.made + i) % len(echo)] for i in range(count)]
            stops = [i for i, token in enumerate(ids) if token in request.submit.stop_token_ids]
            if stops:
                ids = ids[: stops[0] + 1]
            request.made += len(ids)
            request.session.tokens += ids
            wants = request.submit.logprobs is not None
            logprob = messages.TokenLogprob(ids[0], -0.5)
            self.out.append(
                messages.Tokens(
                    request.submit.request_id,
                    ids,
                    [messages.PositionLogprobs(logprob, [logprob])] * len(ids) if wants else [],
                    [bytes(4 * VOCAB_SIZE)] * len(ids) if request.submit.return_logits else [],
                    collected_ns=time.time_ns(),
                )
            )
            if stops:
                self._finish(request, messages.FinishReason.STOP)
            elif request.made >= request.wanted:
                self._finish(request, messages.FinishReason.LENGTH)

    @property
    def busy(self) -> bool:
        return any(HANG not in request.submit.append for request in self.requests.values())

    def report(self) -> messages.Report:
        return messages.Report(
            device=messages.PoolState(100, 60, 20, 15, 5),
            host=messages.PoolState(200, 150, 50, 0, 0),
            counters=messages.Counters(
                stores=7,
                loads=5,
                stored_bytes=7000,
                loaded_bytes=5000,
                requests_completed=self.submits,
                requests_cancelled=self.cancelled,
                evictions=len(self.commands),
            ),
            running_sequences=len(self.requests),
            waiting_requests=0,
            sessions=len(self.sessions),
            load_bytes_per_s=1e9,
            prefill_tokens_per_s=1e3,
            loads_in_flight=0,
            stores_in_flight=1,
            step_seconds=[0.01, 0.03],
            step_batch_sizes=[1, 3],
        )

    def _submit(self, submit: messages.Submit) -> None:
        if CRASH in submit.append:
            os._exit(3)
        if BUG in submit.append:
            raise RuntimeError("a made-up bug")
        if REFUSE in submit.append:
            raise InternalError("refused")
        session = self.sessions.get(submit.session_id)
        if session is None:
            if not submit.create:
                raise UnknownSessionError.of(submit.session_id)
            session = _Session(submit.session_id, record=submit.scheduler_record)
            self.sessions[submit.session_id] = session
            self._tell(messages.SessionEventKind.CREATED, session)
        if session.running is not None:
            raise SessionBusyError("busy")
        context = submit.full_context if submit.full_context is not None else session.tokens
        if len(context) + len(submit.append) >= CONTEXT_LIMIT:
            raise ContextTooLongError(f"at most {CONTEXT_LIMIT} fit")
        expected = submit.expected_context_length
        if submit.full_context is not None:
            session.tokens = list(submit.full_context)
        elif expected is not None and expected != len(session.tokens):
            raise ContextMismatchError(f"expected {expected}, has {len(session.tokens)}")
        cached = len(session.tokens)
        session.tokens += submit.append
        session.generation += 1
        session.running = submit.request_id
        request = _Request(submit, session, len(session.tokens))
        self.requests[submit.request_id] = request
        self._tell(messages.SessionEventKind.GENERATE_STARTED, session)
        now = time.time_ns()
        source = messages.KvSource(
            loaded_blocks=2, loaded_bytes=4096, load_start_ns=now - 2000, load_end_ns=now - 1000
        )
        self.out.append(
            messages.Started(
                submit.request_id,
                request.prompt_length,
                cached,
                session.generation,
                source,
                submit.received_ns,
                now,
            )
        )

    def _finish(self, request: _Request, reason: messages.FinishReason) -> None:
        del self.requests[request.submit.request_id]
        session = request.session
        self._leave(request)
        self.out.append(
            messages.Finished(
                request.submit.request_id,
                reason,
                len(request.submit.append),
                request.made,
                len(session.tokens),
                session.generation,
            )
        )

    def _leave(self, request: _Request) -> None:
        session = request.session
        session.running = None
        session.generation += 1
        session.last_ns = time.time_ns()
        self._tell(messages.SessionEventKind.GENERATE_FINISHED, session)

    def _tell(self, kind: messages.SessionEventKind, session: _Session) -> None:
        self.out.append(messages.SessionEvent(kind, session.state(), time.time_ns()))

    def _command(self, command: messages.Command) -> messages.CommandDone:
        session = self.sessions.get(command.session_id)
        error: ErrorInfo | None = None
        match command.action:
            case messages.Open():
                session = session or _Session(command.session_id)
                self.sessions[command.session_id] = session
            case messages.Close():
                self.sessions.pop(command.session_id, None)
            case messages.Evict() if session is not None:
                session.resident = False
            case messages.Restore() if session is not None:
                session.resident = True
        if session is not None and command.scheduler_record is not None:
            session.record = command.scheduler_record
        if session is None and not isinstance(command.action, messages.Close):
            error = UnknownSessionError.of(command.session_id).to_info()
        elif session is not None and command.expected_generation not in (None, session.generation):
            error = StaleGenerationError("stale").to_info()
        now = time.time_ns()
        moved = error is None and isinstance(command.action, messages.Evict | messages.Restore)
        return messages.CommandDone(
            command_id=command.command_id,
            session_id=command.session_id,
            error=error,
            generation=session.generation if session is not None else 0,
            kv=session.residency() if session is not None else messages.Residency(),
            moved_bytes=4096 if moved else 0,
            moved_blocks=2 if moved else 0,
            resident_blocks=1 if moved else 0,
            copy_start_ns=now - 1_000_000 if moved else 0,
            copy_end_ns=now if moved else 0,
            received_ns=command.received_ns,
            done_ns=now,
            taken_ns=now,
        )


def run(config: EngineConfig, address: str) -> None:
    """Runs a fake engine until `Shutdown` or the test's end; like `run_engine`.

    `config.dtype` "fail" fails the start as a bad configuration does, "die" ends the process
    before it says anything, and "stall" never gets ready.
    """
    context = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.setsockopt(zmq.LINGER, 2000)
    socket.connect(address)
    try:
        code = _serve(config, socket)
    finally:
        socket.close()
        context.term()
    os._exit(code)


def _serve(config: EngineConfig, socket: zmq.Socket[bytes]) -> int:
    def send(*batch: messages.ToFront) -> None:
        socket.send(messages.encode(list(batch)))

    parent = os.getppid()
    if config.dtype == "die":
        return 4
    if config.dtype == "fail":
        send(messages.Failed("--dtype fail: cannot be had", is_config=True))
        return 2
    send(messages.Progress("loading", 0.5))
    if config.dtype != "stall":
        send(
            messages.Ready(
                VOCAB_SIZE, CONTEXT_LIMIT, BLOCK_TOKENS, 1024, "float32", 100, 200, 8, 256
            )
        )
    engine = FakeEngine()
    engine.out.append(engine.report())
    report_ns = time.monotonic_ns()
    while not engine.stopping and os.getppid() == parent:
        if socket.poll(0 if engine.busy else 20):
            try:
                for message in messages.decode_to_engine(socket.recv()):
                    engine.handle(message)
            except RuntimeError as error:
                send(messages.Failed(f"Traceback: {error}", is_config=False))
                return 1
        engine.turn()
        if time.monotonic_ns() - report_ns > config.report_interval_s * 1e9:
            engine.out.append(engine.report())
            report_ns = time.monotonic_ns()
        if engine.out:
            send(*engine.out)
            engine.out = []
    return 0
