"""The worker's configuration, parsed once and handed to both its processes.

Units are in the names; every default is here and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from services.common.config import TelemetryConfig


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What the engine process needs to start.

    Attributes:
        model: A local folder, a hub id, ``smollm2``, or ``dummy:<shape>``.
        device: ``cpu``, ``cuda`` or ``cuda:<index>``.
        dtype: Element type of weights and KV as torch names it, or ``auto``: the checkpoint's on
            a GPU, float32 on a CPU.
        attention: Name of an attention backend, or ``auto``.
        seed: Seeds random weights.
        block_size_tokens: Tokens per block; 0 chooses so that a block is about 8 MiB on a GPU and
            16 tokens on a CPU.
        device_pool_gib: Size of the device pool; None sizes it from free memory.
        device_memory_fraction: Share of the device's memory to use when `device_pool_gib` is None.
        host_pool_gib: Size of the host pool.
        max_context_length: Most tokens in a context; None: the model's limit.
        max_running_sequences: Most sequences in one step.
        max_step_tokens: Most tokens in one step; long prompts are prefilled in chunks of it.
            0: 2,048 on a GPU, 256 on a CPU.
        write_through: Copy each block to the host as soon as it is full.
        low_watermark: Share of a pool's blocks that is kept free or reclaimable ahead of need.
        report_interval_s: How often the engine reports.
        cpu_threads: Threads for CPU kernels; None: torch's choice.
    """

    model: str
    device: str = "cpu"
    dtype: str = "auto"
    attention: str = "auto"
    seed: int = 0
    block_size_tokens: int = 0
    device_pool_gib: float | None = None
    device_memory_fraction: float = 0.9
    host_pool_gib: float = 4.0
    max_context_length: int | None = None
    max_running_sequences: int = 64
    max_step_tokens: int = 0
    write_through: bool = True
    low_watermark: float = 0.05
    report_interval_s: float = 0.25
    cpu_threads: int | None = None


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """What the front process needs, the engine's part included.

    Attributes:
        engine: The engine's part.
        worker_id: Stable name, at most 128 characters of ``[A-Za-z0-9._:-]``.
        host: Address to listen on.
        port: Port of the InferenceService; 0 takes a free one.
        advertised_endpoint: host:port that clients are told; None: ``<host>:<bound port>``.
        scheduler: host:port of the scheduler; None: run without one.
        metrics_port: Port of ``/metrics``; 0 takes a free one.
        drain_timeout_s: How long running requests may go on after SIGTERM.
        telemetry: Traces and logs.
    """

    engine: EngineConfig
    worker_id: str = "worker-0"
    host: str = "127.0.0.1"
    port: int = 5557
    advertised_endpoint: str | None = None
    scheduler: str | None = None
    metrics_port: int = 9096
    drain_timeout_s: float = 10.0
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
