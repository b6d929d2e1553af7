"""The engine process: builds the engine, then turns it for as long as the front lives."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import select
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import torch
import zmq

from services.common.errors import ConfigError
from services.worker.config import EngineConfig
from services.worker.engine.block_manager import BlockManager
from services.worker.engine.cuda_copies import choose_copy
from services.worker.engine.cuda_streams import CudaStream, DeviceClock
from services.worker.engine.device_memory import log_use, measure
from services.worker.engine.engine import Engine, EngineLimits
from services.worker.engine.host_pool import CudaPinning, HostPool
from services.worker.engine.kv_cache import KVCache
from services.worker.engine.kv_layout import KVLayout
from services.worker.engine.kv_mover import KvMover
from services.worker.engine.model_loader import LoadedModel, load
from services.worker.engine.model_runner import ModelRunner
from services.worker.engine.sizing import choose_block_size, choose_sizes, choose_step_tokens
from services.worker.engine.stages import StageTimes
from services.worker.engine.step_clock import StepClock
from services.worker.engine.streams import CpuStream, Stream, Wakeup
from services.worker.engine.transfer import Transfers
from services.worker.messages import (
    Failed,
    Progress,
    Ready,
    ToFront,
    decode_to_engine,
    encode,
)

_log = logging.getLogger(__name__)

EXIT_BUG = 1
EXIT_CONFIG = 2


@dataclass(frozen=True, slots=True)
class Built:
    """An engine and what it stands on."""

    engine: Engine
    ready: Ready
    streams: tuple[Stream, ...]
    host: HostPool
    wakes_loop: bool


def build(config: EngineConfig, wakeup: Wakeup, report: Callable[[str, float], None]) -> Built:
    """Loads the model, allocates the pools and warms up.

    Args:
        config: What to build.
        wakeup: Set whenever a CPU stream reaches an event.
        report: Told what is being done and the fraction done.

    Raises:
        ConfigError: The configuration cannot be met here.
    """
    if not 0 <= config.low_watermark < 1:
        raise ConfigError(f"low watermark {config.low_watermark}: at least 0, below 1")
    stages = StageTimes(report)
    loaded = load(config, stages)
    on_gpu = loaded.device.type == "cuda"
    layout = _layout(config, loaded)
    max_step_tokens = choose_step_tokens(config, loaded.device)
    memory = measure(loaded, max_step_tokens, config.max_running_sequences)
    sizes = choose_sizes(config, layout, loaded.max_context_length, max_step_tokens, memory)
    stages("allocating the pools", 0.0)
    cache = KVCache(layout, sizes.device_blocks, loaded.device)
    host = HostPool(
        sizes.host_blocks, layout.block_bytes, pinning=CudaPinning() if on_gpu else None
    )
    compute, loads, stores = _streams(loaded.device, wakeup)
    stages("preparing the model", 0.0)
    runner = ModelRunner(
        loaded,
        layout,
        cache.kv,
        compute,
        attention=config.attention,
        max_running_sequences=config.max_running_sequences,
    )
    if on_gpu:
        # Weights and pool were made on the default stream, which the others do not wait for.
        torch.cuda.synchronize(loaded.device)
    stages("warming up", 0.0)
    runner.warm_up(stages)
    if memory is not None:
        log_use(memory, cache.bytes.nbytes, loaded.device)
    mover = KvMover(
        BlockManager(sizes.device_blocks, host.usable_blocks, layout.block_size_tokens),
        Transfers(loads, stores, copy=choose_copy(loaded.device)),
        cache.bytes,
        host.bytes,
        layout.block_bytes,
        host.chunk_blocks() if on_gpu else None,
    )
    limits = EngineLimits(
        vocab_size=loaded.vocab_size,
        max_context_length=sizes.max_context_length,
        max_running_sequences=config.max_running_sequences,
        max_step_tokens=sizes.max_step_tokens,
        write_through=config.write_through,
        low_watermark=config.low_watermark,
        hash_salt=f"{loaded.fingerprint}/{layout}".encode(),
    )
    ready = Ready(
        vocab_size=loaded.vocab_size,
        max_context_length=sizes.max_context_length,
        block_size_tokens=layout.block_size_tokens,
        block_bytes=layout.block_bytes,
        dtype=str(layout.dtype).removeprefix("torch."),
        device_blocks=sizes.device_blocks,
        host_blocks=sizes.host_blocks,
        max_running_sequences=config.max_running_sequences,
        max_step_tokens=sizes.max_step_tokens,
    )
    engine = Engine(mover, runner, compute, cache, limits, StepClock())
    _log.info("the engine is built, in %s", stages.summary())
    return Built(engine, ready, (compute, loads, stores), host, wakes_loop=not on_gpu)


def run_engine(config: EngineConfig, address: str) -> None:
    """Runs the engine until `Shutdown` or the front's end.

    Args:
        config: What to build.
        address: ZeroMQ address that the front listens on.

    Raises:
        SystemExit: With `EXIT_CONFIG` or `EXIT_BUG`, after telling the front why.
    """
    context = zmq.Context()
    socket = context.socket(zmq.PAIR)
    # The step loop never waits for the front; what is under way is bounded by the requests.
    socket.set_hwm(0)
    socket.setsockopt(zmq.LINGER, 2000)
    socket.connect(address)

    def send(*messages: ToFront) -> None:
        socket.send(encode(list(messages)))

    try:
        wakeup = Wakeup()
        built = build(config, wakeup, lambda what, done: send(Progress(what, done)))
        send(built.ready)
        gc.collect()
        gc.freeze()
        _loop(built, socket, wakeup, config.report_interval_s)
        for stream in built.streams:
            stream.close()
        built.host.close()
    except ConfigError as error:
        send(Failed(str(error), is_config=True))
        sys.exit(EXIT_CONFIG)
    except Exception:  # noqa: BLE001 - the process ends here; the front tells its users
        send(Failed(traceback.format_exc(), is_config=False))
        _log.exception("the engine failed")
        sys.exit(EXIT_BUG)
    finally:
        socket.close()
        context.term()


def _loop(
    built: Built, socket: zmq.Socket[bytes], wakeup: Wakeup, report_interval_s: float
) -> None:
    engine = built.engine
    parent = multiprocessing.parent_process()
    watched = [wakeup.fileno()] + ([] if parent is None else [parent.sentinel])
    report_due = time.monotonic()
    while True:
        wakeup.clear()
        # Tokens go out before anything else is done.
        engine.collect()
        _flush(engine, socket)
        _receive(engine, socket)
        if engine.stopping:
            break
        engine.grow_host(built.host.usable_blocks)
        engine.turn()
        now = time.monotonic()
        if now >= report_due:
            engine.outbox.append(engine.report())
            report_due = now + report_interval_s
        _flush(engine, socket)
        # A GPU's events wake nobody, so while any is awaited the loop spins.
        spin = not built.wakes_loop and not engine.idle
        due = report_due if engine.due_s is None else min(report_due, engine.due_s)
        timeout_s = 0.0 if spin else max(0.0, due - time.monotonic())
        ready = _wait(socket, watched, timeout_s)
        if parent is not None and parent.sentinel in ready:
            _log.error("the front process is gone; the engine ends")
            return
    _flush(engine, socket)


def _wait(socket: zmq.Socket[bytes], watched: list[int], timeout_s: float) -> list[int]:
    """Waits for a message or a descriptor; returns the descriptors that are ready.

    ZeroMQ's own poll counts whole milliseconds, which is long for when a step is due.
    """
    # The socket's descriptor tells of changes only, and asking for its state takes them in.
    if int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
        timeout_s = 0.0
    ready, _, _ = select.select([socket.fileno(), *watched], [], [], timeout_s)
    return ready


def _receive(engine: Engine, socket: zmq.Socket[bytes]) -> None:
    while True:
        try:
            frame = socket.recv(zmq.NOBLOCK)
        except zmq.Again:
            return
        for message in decode_to_engine(frame):
            engine.handle(message)


def _flush(engine: Engine, socket: zmq.Socket[bytes]) -> None:
    if not engine.outbox:
        return
    batch, engine.outbox = engine.outbox, []
    socket.send(encode(batch))


def _layout(config: EngineConfig, loaded: LoadedModel) -> KVLayout:
    one = KVLayout(loaded.num_layers, 1, loaded.num_kv_heads, loaded.head_dim, loaded.dtype)
    return KVLayout(
        loaded.num_layers,
        choose_block_size(config, one.token_bytes),
        loaded.num_kv_heads,
        loaded.head_dim,
        loaded.dtype,
    )


def _streams(device: torch.device, wakeup: Wakeup) -> tuple[Stream, Stream, Stream]:
    """Returns the streams for compute, loads and stores."""
    if device.type == "cuda":
        clock = DeviceClock(device)
        return CudaStream(device, clock), CudaStream(device, clock), CudaStream(device, clock)
    return CpuStream("compute", wakeup), CpuStream("load", wakeup), CpuStream("store", wakeup)
