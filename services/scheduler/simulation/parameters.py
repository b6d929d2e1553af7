"""What a modelled worker can hold and how fast it is, read from a JSON file.

A step's time is modelled as::

    overhead_s + rows(new tokens of all sequences) + KV tokens read * kv_bytes_per_token
    / kv_read_bytes_per_s + attention_s_per_pair * (new token, earlier token) pairs of prompts

`rows` is the part that depends on the batch's width alone: weights are read once, products grow
with the rows. It is a table of measured points, between which it is linear. Reading KV is bound by
the device memory's bandwidth, and attention over a long prompt by its arithmetic.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from pathlib import Path
from typing import Annotated

import msgspec

from services.common.errors import ConfigError

SHIPPED = Path(__file__).parent / "workers"

Positive = Annotated[float, msgspec.Meta(gt=0)]
NotNegative = Annotated[float, msgspec.Meta(ge=0)]
PositiveCount = Annotated[int, msgspec.Meta(ge=1)]
Count = Annotated[int, msgspec.Meta(ge=0)]


class StepTimes(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How long a step takes; the module has the formula.

    Attributes:
        rows: Points (new tokens in the step, seconds without reading KV), rising in both.
        kv_read_bytes_per_s: How fast a step reads KV on the device.
        attention_s_per_pair: Seconds for each pair of a prompt's new token and one before it.
        overhead_s: What the engine's loop does between two steps.
    """

    rows: list[tuple[PositiveCount, Positive]]
    kv_read_bytes_per_s: Positive
    attention_s_per_pair: NotNegative = 0.0
    overhead_s: NotNegative = 0.0


class Latencies(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How long messages take, each from one process's hands into the next one's.

    Attributes:
        signal_s: Client to scheduler, and back.
        command_s: Scheduler to engine.
        event_s: Engine to scheduler.
        submit_s: Generate from client to engine, tokenizing included.
        return_s: A token from engine to client.
    """

    signal_s: NotNegative = 0.0
    command_s: NotNegative = 0.0
    event_s: NotNegative = 0.0
    submit_s: NotNegative = 0.0
    return_s: NotNegative = 0.0


class WorkerParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One kind of worker.

    Attributes:
        source: Where the figures are from.
        model: What it serves.
        block_size_tokens: Tokens per block.
        kv_bytes_per_token: Of all layers, K and V.
        device_pool_bytes: Of KV on the device.
        host_pool_bytes: Of KV in host memory.
        max_context_length: Most tokens in a context.
        max_running_sequences: Most sequences in a step.
        max_step_tokens: Most tokens in a step.
        prompt_tokens_beside_decodes: Most prompt tokens in a step that decodes others too.
        write_through: Blocks are stored as soon as they are full.
        low_watermark: Share of the device pool that is kept available ahead of need.
        load_bytes_per_s: Host to device, alone.
        store_bytes_per_s: Device to host, alone.
        both_ways_bytes_per_s: Each direction while the other is busy too.
        copy_latency_s: Before the first byte of a copy.
        step: How long steps take.
        latencies: How long messages take.
    """

    source: str
    model: str
    block_size_tokens: PositiveCount
    kv_bytes_per_token: PositiveCount
    device_pool_bytes: PositiveCount
    host_pool_bytes: Count
    max_context_length: PositiveCount
    max_running_sequences: PositiveCount = 64
    max_step_tokens: PositiveCount = 2048
    prompt_tokens_beside_decodes: PositiveCount = 256
    write_through: bool = True
    low_watermark: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.05
    load_bytes_per_s: Positive
    store_bytes_per_s: Positive
    both_ways_bytes_per_s: Positive
    copy_latency_s: NotNegative = 0.0
    step: StepTimes
    latencies: Latencies = Latencies()

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return self.block_size_tokens * self.kv_bytes_per_token

    @property
    def device_blocks(self) -> int:
        """Blocks of the device pool."""
        return self.device_pool_bytes // self.block_bytes

    @property
    def host_blocks(self) -> int:
        """Blocks of the host pool."""
        return self.host_pool_bytes // self.block_bytes


class StepModel:
    """Step times of a worker, ready for looking up.

    Args:
        parameters: The worker's.
    """

    def __init__(self, parameters: WorkerParameters) -> None:
        times = parameters.step
        self._rows = [rows for rows, _ in times.rows]
        self._seconds = [seconds for _, seconds in times.rows]
        self._overhead_s = times.overhead_s
        self._s_per_kv_token = parameters.kv_bytes_per_token / times.kv_read_bytes_per_s
        self._s_per_pair = times.attention_s_per_pair
        self._known: dict[int, float] = {}

    def seconds(self, rows: int, kv_tokens: float, pairs: float = 0.0) -> float:
        """Returns how long a step takes.

        Args:
            rows: New tokens of all sequences, at least 1.
            kv_tokens: Tokens whose KV is read, the new ones included.
            pairs: Pairs of a prompt's new token and one before it.
        """
        width_s = self._known.get(rows)
        if width_s is None:
            width_s = self._known[rows] = self._interpolate(rows) + self._overhead_s
        return width_s + kv_tokens * self._s_per_kv_token + pairs * self._s_per_pair

    def _interpolate(self, rows: int) -> float:
        points, seconds = self._rows, self._seconds
        place = bisect_left(points, rows)
        if place == 0 or len(points) == 1:
            return seconds[0]
        # Beyond the last point the last slope goes on.
        place = min(place, len(points) - 1)
        low, high = points[place - 1], points[place]
        slope = (seconds[place] - seconds[place - 1]) / (high - low)
        return seconds[place - 1] + (rows - low) * slope


def shipped() -> list[str]:
    """Returns the names of the parameter files that come with the program."""
    return sorted(path.stem for path in SHIPPED.glob("*.json"))


def load(name: str) -> WorkerParameters:
    """Reads parameters.

    Args:
        name: One of `shipped`, or a file.

    Raises:
        ConfigError: There is no such file, or it is malformed; the message is one line.
    """
    path = SHIPPED / f"{name}.json" if name in shipped() else Path(name)
    try:
        data = path.read_bytes()
    except OSError as error:
        known = ", ".join(shipped())
        raise ConfigError(f"--params {name}: {error.strerror}; shipped are {known}") from None
    try:
        found = msgspec.json.decode(data, type=WorkerParameters)
    except msgspec.DecodeError as error:
        raise ConfigError(f"--params {name}: {error}") from None
    check(found, f"--params {name}")
    return found


def check(parameters: WorkerParameters, origin: str) -> None:
    """Checks what the types cannot say.

    Raises:
        ConfigError: The parameters contradict themselves.
    """
    rows = [count for count, _ in parameters.step.rows]
    seconds = [value for _, value in parameters.step.rows]
    if not rows or rows != sorted(set(rows)) or seconds != sorted(seconds):
        raise ConfigError(f"{origin}: step.rows: expected points that rise, got {rows} {seconds}")
    if parameters.device_blocks < 1:
        raise ConfigError(
            f"{origin}: device_pool_bytes: {parameters.device_pool_bytes} is less than a block of "
            f"{parameters.block_bytes}"
        )


def rows_from_bench(
    result: Path, kv_bytes_per_token: int, kv_read_bytes_per_s: float
) -> list[tuple[int, float]]:
    """Returns `StepTimes.rows` from a result of ``python -m bench step --json``.

    The time for reading KV is taken off each measured step. Of shapes of one width the faster
    counts, and a width that was measured to be faster than a narrower one takes that one's time.

    Args:
        result: The file.
        kv_bytes_per_token: Of the model that was measured.
        kv_read_bytes_per_s: Of the device.

    Raises:
        ConfigError: The file cannot be read or is not such a result.
    """
    try:
        rows = json.loads(result.read_text(encoding="utf-8"))["rows"]
        found: dict[int, float] = {}
        for row in rows:
            shape = row["shape"]
            if not shape["new"]:
                continue  # decodes and a prompt at once: the sum of others
            width = shape["sequences"] * shape["new"]
            read = shape["sequences"] * (shape["context"] + shape["new"]) * kv_bytes_per_token
            seconds = max(row["step_ms"] / 1e3 - read / kv_read_bytes_per_s, 1e-6)
            found[width] = min(seconds, found.get(width, seconds))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{result}: not a result of bench step: {error!r}") from None
    points: list[tuple[int, float]] = []
    for width in sorted(found):
        seconds = max(found[width], points[-1][1] if points else 0.0)
        points.append((width, round(seconds, 7)))
    return points
