"""The front's side of the engine: its process, the socket between them, and who gets what.

One ZeroMQ PAIR socket carries batches of `messages` both ways. What is sent within one turn of the
event loop leaves as one frame; a frame that arrives is dealt out in its order, so that first
tokens, which the engine puts in front, wake their clients first.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import shutil
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Protocol

import msgspec
import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from services.common.errors import (
    ConfigError,
    DjinnError,
    DrainingError,
    EngineLostError,
    InternalError,
)
from services.worker import messages
from services.worker.config import EngineConfig
from services.worker.front.generation import Generation

_logger = logging.getLogger(__name__)

EngineTarget = Callable[[EngineConfig, str], None]
"""What the engine process runs: given the configuration and the address of the front's socket."""


class EngineListener(Protocol):
    """Who is told what the engine does apart from running requests; must not wait."""

    def on_command_done(self, done: messages.CommandDone) -> None: ...

    def on_session_event(self, event: messages.SessionEvent) -> None: ...

    def on_snapshot(self, snapshot: messages.Snapshot) -> None: ...

    def on_report(self, report: messages.Report) -> None: ...

    def on_generation_over(self, generation: Generation) -> None: ...


class EngineClient:
    """Starts the engine process and speaks with it."""

    def __init__(self, config: EngineConfig, target: EngineTarget) -> None:
        """Prepares; nothing is started.

        Args:
            config: The engine's configuration.
            target: Run in the engine process; must be importable by name.
        """
        self._config = config
        self._target = target
        self._listeners: list[EngineListener] = []
        self._generations: dict[str, Generation] = {}
        self._outbox: list[messages.ToEngine] = []
        self._stopping = False
        self._failed: messages.Failed | None = None
        self._folder: Path | None = None
        self._socket: zmq.asyncio.Socket | None = None
        self._context: zmq.asyncio.Context | None = None
        self._process: SpawnProcess | None = None
        self._reader: asyncio.Task[None] | None = None
        self._ready: asyncio.Future[messages.Ready] | None = None
        self._lost = asyncio.Event()
        self._idle = asyncio.Event()
        self._monitor: zmq.asyncio.Socket | None = None
        self._ending: asyncio.Task[None] | None = None

    def add_listener(self, listener: EngineListener) -> None:
        """Tells `listener` from now on what the engine does."""
        self._listeners.append(listener)

    # --- its life ---

    async def start(self) -> None:
        """Starts the process and the socket; `wait_ready` says when it can be used."""
        loop = asyncio.get_running_loop()
        self._folder = Path(tempfile.mkdtemp(prefix="djinn-"))
        address = f"ipc://{self._folder / 'engine'}"
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.PAIR)
        # Neither side may ever wait for the other: what is under way is bounded by the requests
        # that run, not by the socket.
        self._socket.set_hwm(0)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._monitor = self._socket.get_monitor_socket(zmq.Event.ACCEPTED | zmq.Event.DISCONNECTED)
        self._socket.bind(address)
        self._ready = loop.create_future()
        self._reader = asyncio.create_task(self._read(self._socket), name="engine-reader")
        self._reader.add_done_callback(self._on_reader_end)
        process = multiprocessing.get_context("spawn").Process(
            target=self._target, args=(self._config, address), name="djinn-engine", daemon=False
        )
        # Some milliseconds, and in this thread: a child that asks the kernel to be told of its
        # parent's death is told of that of the thread which started it.
        process.start()
        self._process = process
        loop.add_reader(process.sentinel, self._on_process_end)

    async def wait_ready(self) -> messages.Ready:
        """Waits until the engine can take requests.

        Raises:
            ConfigError: The engine cannot start as configured.
            EngineLostError: It ended before it was ready.
        """
        assert self._ready is not None, "start() comes first"
        return await asyncio.shield(self._ready)

    async def wait_lost(self) -> EngineLostError:
        """Waits until the engine process has ended without having been told to."""
        await self._lost.wait()
        return self._lost_error()

    @property
    def alive(self) -> bool:
        """True from the engine's first message that it is ready until its end."""
        ready = self._ready is not None and self._ready.done() and not self._ready.cancelled()
        return ready and not self._lost.is_set() and not self._stopping

    @property
    def running(self) -> int:
        """Requests that have been submitted and are not over."""
        return len(self._generations)

    async def wait_idle(self) -> None:
        """Waits until no request is running.

        Raises:
            EngineLostError: The engine has ended, and failed those that were.
        """
        while self._generations:
            self._idle.clear()
            await self._idle.wait()
        if self._lost.is_set():
            raise self._lost_error()

    def fail_all(self, error: DjinnError) -> None:
        """Ends every running request with an error."""
        generations, self._generations = self._generations, {}
        for generation in generations.values():
            generation.fail(error)
            self._tell_over(generation)

    async def stop(self, timeout_s: float = 10.0) -> None:
        """Ends the engine and all requests: asks it to, kills it if it has not by `timeout_s`."""
        self.fail_all(DrainingError("the worker stopped before the request was done"))
        process = self._process
        if process is not None:
            if process.is_alive() and not self.alive:
                # It listens to nobody before it is ready, and has nothing to finish.
                self._stopping = True
                process.kill()
                await self._wait_exit(process, None)
            elif process.is_alive():
                self.send(messages.Shutdown())
                self._flush()
                self._stopping = True
                if not await self._wait_exit(process, timeout_s):
                    _logger.warning("the engine did not end within %g s: killing it", timeout_s)
                    process.kill()
                    await self._wait_exit(process, None)
            asyncio.get_running_loop().remove_reader(process.sentinel)
            process.join()
        tasks = [task for task in (self._reader, self._ending) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._monitor is not None:
            self._monitor.close()
        if self._socket is not None:
            self._socket.close()
        if self._context is not None:
            self._context.term()
        self._remove_folder()

    # --- sending ---

    def send(self, message: messages.ToEngine) -> None:
        """Sends a message with all others of this turn of the event loop."""
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outbox.append(message)

    def submit(self, generation: Generation) -> None:
        """Sends a request; its output goes to `generation` until it is over."""
        self._generations[generation.submit.request_id] = generation
        self.send(generation.submit)

    def _flush(self) -> None:
        if not self._outbox or self._socket is None or self._socket.closed or self._stopping:
            return
        frame = messages.encode(self._outbox)
        self._outbox = []
        # Without a high-water mark and with one peer this is done at once; before the engine has
        # connected the library keeps it.
        self._socket.send(frame, copy=len(frame) < (64 << 10))

    # --- receiving ---

    async def _read(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            self._deal_frame(await socket.recv())

    def _deal_frame(self, frame: bytes) -> None:
        try:
            batch = messages.decode_to_front(frame)
        except msgspec.MsgspecError:
            _logger.exception("the engine sent what is not a batch of messages")
            return
        for message in batch:
            self._deal(message)

    def _deal(self, message: messages.ToFront) -> None:
        match message:
            case messages.Tokens() | messages.Started() | messages.Finished() | messages.Rejected():
                if (generation := self._generations.get(message.request_id)) is not None:
                    self._deal_to(generation, message)
            case messages.Progress() | messages.Ready() | messages.Failed():
                self._on_life(message)
            case _:
                for listener in self._listeners:
                    with _surviving_bugs(message):
                        _tell(listener, message)

    def _deal_to(self, generation: Generation, message: messages.OfRequest) -> None:
        ends = isinstance(message, messages.Finished | messages.Rejected)

        def fail() -> None:
            if not ends:
                generation.cancel()
            generation.fail(InternalError("a bug of the worker's front: its log has the stack"))

        with _surviving_bugs(message, fail):
            generation.take(message)
        if ends or generation.over:
            self._generations.pop(message.request_id, None)
            self._tell_over(generation)

    def _on_life(self, message: messages.Progress | messages.Ready | messages.Failed) -> None:
        assert self._ready is not None
        match message:
            case messages.Progress():
                _logger.info("engine: %s (%.0f %%)", message.what, 100 * message.fraction)
            case messages.Ready():
                # Nobody else is to connect, and nothing is left behind if this process is killed.
                self._remove_folder()
                if not self._ready.done():
                    self._ready.set_result(message)
            case messages.Failed():
                self._failed = message

    def _tell_over(self, generation: Generation) -> None:
        if not self._generations:
            self._idle.set()
        for listener in self._listeners:
            with _surviving_bugs(generation):
                listener.on_generation_over(generation)

    # --- its end ---

    def _on_reader_end(self, reader: asyncio.Task[None]) -> None:
        """Ends an engine that nobody hears any more, so that its end is seen as any other's."""
        if self._stopping or reader.cancelled():
            return
        _logger.error("nobody reads what the engine says", exc_info=reader.exception())
        if self._process is not None:
            self._process.kill()

    def _on_process_end(self) -> None:
        assert self._process is not None
        asyncio.get_running_loop().remove_reader(self._process.sentinel)
        if not self._stopping:
            self._ending = asyncio.create_task(self._on_lost(), name="engine-lost")

    async def _on_lost(self) -> None:
        # It has closed its end of the sentinel, and is about to be a process with an exit code.
        assert self._process is not None
        await asyncio.to_thread(self._process.join, _LAST_WORDS_S)
        with _surviving_bugs("the engine's last words"):
            await self._hear_last_words()
        if self._stopping:
            return
        self._lost.set()
        error = self._lost_error()
        if self._failed is not None and not self._failed.is_config:
            _logger.error("the engine failed: %s", self._failed.message)
        if self._ready is not None and not self._ready.done():
            if self._failed is not None and self._failed.is_config:
                self._ready.set_exception(ConfigError(self._failed.message))
            else:
                self._ready.set_exception(error)
            # Whoever waits for it hears of it; nobody has to.
            self._ready.exception()
        self.fail_all(error)

    async def _hear_last_words(self) -> None:
        """Deals out what the engine sent before it ended, most of all `Failed`."""
        assert self._socket is not None
        assert self._monitor is not None
        assert self._reader is not None
        try:
            async with asyncio.timeout(_LAST_WORDS_S):
                # All that came over a connection has been received when its end is noticed. An
                # engine that never connected has said nothing.
                connected = False
                while await self._monitor.poll(0 if not connected else None):
                    event = (await recv_monitor_message(self._monitor))["event"]
                    if event == zmq.Event.DISCONNECTED:
                        break
                    connected = True
        except TimeoutError:
            _logger.warning("the connection outlived the engine process")
        self._reader.cancel()
        await asyncio.wait([self._reader])
        with contextlib.suppress(zmq.Again):
            while True:
                self._deal_frame(await self._socket.recv(zmq.NOBLOCK))

    def _lost_error(self) -> EngineLostError:
        assert self._process is not None
        code = self._process.exitcode
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        return EngineLostError(f"the worker's engine process has ended ({how})")

    def _remove_folder(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    async def _wait_exit(self, process: SpawnProcess, timeout_s: float | None) -> bool:
        """Waits for the process to end; returns whether it has."""
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        loop.remove_reader(process.sentinel)
        loop.add_reader(process.sentinel, ended.set)
        try:
            async with asyncio.timeout(timeout_s):
                await ended.wait()
        except TimeoutError:
            return False
        finally:
            loop.remove_reader(process.sentinel)
        return True


def _tell(
    listener: EngineListener,
    message: messages.SessionEvent | messages.CommandDone | messages.Report | messages.Snapshot,
) -> None:
    match message:
        case messages.SessionEvent():
            listener.on_session_event(message)
        case messages.CommandDone():
            listener.on_command_done(message)
        case messages.Report():
            listener.on_report(message)
        case messages.Snapshot():
            listener.on_snapshot(message)


@contextlib.contextmanager
def _surviving_bugs(about: object, then: Callable[[], None] | None = None) -> Iterator[None]:
    """Keeps what goes wrong with one message from all others: logs it, and does `then`."""
    try:
        yield
    except Exception:  # a reader that ended would leave the worker deaf
        _logger.exception("a bug in dealing with %s", type(about).__name__)
        if then is not None:
            then()


_LAST_WORDS_S = 5.0
"""How long after the engine's end its connection may take to be seen closed."""
