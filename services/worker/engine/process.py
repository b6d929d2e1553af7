"""The engine process: builds the engine, then turns it for as long as the front lives."""

from __future__ import annotations

import gc
import logging
import math
import multiprocessing
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
from services.worker.engine.cuda_streams import CudaStream
from services.worker.engine.engine import Engine, EngineLimits
from services.worker.engine.host_pool import CudaPinning, HostPool
from services.worker.engine.kv_cache import KVCache
from services.worker.engine.kv_layout import KVLayout
from services.worker.engine.kv_mover import KvMover
from services.worker.engine.model_loader import LoadedModel, load
from services.worker.engine.model_runner import ModelRunner
from services.worker.engine.sizing import choose_block_size, choose_sizes
from services.worker.engine.streams import CpuStream, Stream, Wakeup
from services.worker.engine.transfer import Transfers
from services.worker.messages import (
    Failed,
    Progress,
    Ready,
    Started,
    ToFront,
    Tokens,
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
    loaded = load(config, report)
    layout = _layout(config, loaded)
    sizes = choose_sizes(config, layout, loaded.max_context_length, loaded.device)
    report("allocating the pools", 0.0)
    on_gpu = loaded.device.type == "cuda"
    cache = KVCache(layout, sizes.device_blocks, loaded.device)
    host = HostPool(
        sizes.host_blocks, layout.block_bytes, pinning=CudaPinning() if on_gpu else None
    )
    compute, loads, stores = (
        _stream(name, loaded.device, wakeup) for name in ("compute", "load", "store")
    )
    runner = ModelRunner(
        loaded,
        layout,
        cache.kv,
        compute,
        attention=config.attention,
        max_running_sequences=config.max_running_sequences,
    )
    report("warming up", 0.0)
    runner.warm_up(report)
    mover = KvMover(
        BlockManager(sizes.device_blocks, host.usable_blocks, layout.block_size_tokens),
        Transfers(loads, stores),
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
    engine = Engine(mover, runner, compute, cache, limits)
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
    poller = zmq.Poller()
    poller.register(socket, zmq.POLLIN)
    poller.register(wakeup.fileno(), zmq.POLLIN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        poller.register(parent.sentinel, zmq.POLLIN)
    report_due = time.monotonic()
    while True:
        wakeup.clear()
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
        timeout_s = 0.0 if spin else max(0.0, report_due - time.monotonic())
        ready = poller.poll(math.ceil(timeout_s * 1000))
        if parent is not None and any(fd == parent.sentinel for fd, _ in ready):
            _log.error("the front process is gone; the engine ends")
            return
    _flush(engine, socket)


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
    socket.send(encode(_wakes_first(batch)))


def _wakes_first(batch: list[ToFront]) -> list[ToFront]:
    """Moves requests' first tokens to the front of a batch; each request's own order stays."""
    fresh = {message.request_id for message in batch if isinstance(message, Started)}
    if not fresh:
        return batch
    first = [m for m in batch if isinstance(m, Started | Tokens) and m.request_id in fresh]
    rest = [m for m in batch if not (isinstance(m, Started | Tokens) and m.request_id in fresh)]
    return first + rest


def _layout(config: EngineConfig, loaded: LoadedModel) -> KVLayout:
    one = KVLayout(loaded.num_layers, 1, loaded.num_kv_heads, loaded.head_dim, loaded.dtype)
    return KVLayout(
        loaded.num_layers,
        choose_block_size(config, one.token_bytes),
        loaded.num_kv_heads,
        loaded.head_dim,
        loaded.dtype,
    )


def _stream(name: str, device: torch.device, wakeup: Wakeup) -> Stream:
    if device.type == "cuda":
        return CudaStream(device)
    return CpuStream(name, wakeup)
