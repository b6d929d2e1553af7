"""Plain data for tests of the front."""

from __future__ import annotations

from services.worker import messages
from services.worker.front.generator import ServedModel

READY = messages.Ready(
    vocab_size=100,
    max_context_length=50,
    block_size_tokens=16,
    block_bytes=1024,
    dtype="float32",
    device_blocks=10,
    host_blocks=20,
    max_running_sequences=4,
    max_step_tokens=64,
)
MODEL = ServedModel("dummy:test", READY, eos_token_ids=(2,))


def submit(**fields: object) -> messages.Submit:
    """Returns a request of session "s" that appends tokens 10 and 11."""
    values: dict[str, object] = {
        "request_id": "1:r",
        "session_id": "s",
        "create": True,
        "cache_salt": "",
        "priority": 0,
        "scheduler_record": b"",
        "full_context": None,
        "expected_context_length": None,
        "append": [10, 11],
        "sampling": messages.SamplingParams(),
        "max_tokens": None,
        "stop_token_ids": [],
        "logprobs": None,
        "return_logits": False,
        "received_ns": 1_000,
    }
    return messages.Submit(**{**values, **fields})  # type: ignore[arg-type]


def started(context_length: int = 2, **fields: object) -> messages.Started:
    """Returns the start of `submit`'s request."""
    values: dict[str, object] = {
        "request_id": "1:r",
        "context_length": context_length,
        "cached_tokens": 0,
        "generation": 1,
        "kv": messages.KvSource(),
        "queued_ns": 2_000,
        "started_ns": 3_000,
    }
    return messages.Started(**{**values, **fields})  # type: ignore[arg-type]


def tokens(*ids: int, logits: list[bytes] | None = None) -> messages.Tokens:
    """Returns tokens of `submit`'s request."""
    return messages.Tokens("1:r", list(ids), [], logits or [])


def finished(context_length: int, reason: str = "length") -> messages.Finished:
    """Returns the end of `submit`'s request."""
    return messages.Finished("1:r", messages.FinishReason(reason), 2, 1, context_length, 2)


def session_state(session_id: str = "s", context_length: int = 5) -> messages.SessionState:
    """Returns an idle session."""
    kv = messages.Residency(1, 1, 1, 0, True)
    return messages.SessionState(session_id, 3, context_length, kv, False, b"record", 9_000)


def command_done(command_id: str = "c", **fields: object) -> messages.CommandDone:
    """Returns a command that ended well."""
    values: dict[str, object] = {
        "command_id": command_id,
        "session_id": "s",
        "error": None,
        "generation": 3,
        "kv": messages.Residency(),
    }
    return messages.CommandDone(**{**values, **fields})  # type: ignore[arg-type]


def report(**fields: object) -> messages.Report:
    """Returns a report of an engine that has done a little."""
    values: dict[str, object] = {
        "device": messages.PoolState(10, 4, 3, 2, 1),
        "host": messages.PoolState(20, 15, 5, 0, 0),
        "counters": messages.Counters(stores=3, loads=2, stored_bytes=300, loaded_bytes=200),
        "running_sequences": 2,
        "waiting_requests": 1,
        "sessions": 4,
        "load_bytes_per_s": 1e9,
        "prefill_tokens_per_s": 500.0,
        "loads_in_flight": 1,
        "stores_in_flight": 0,
        "step_seconds": [0.01, 0.03],
        "step_batch_sizes": [1, 3],
    }
    return messages.Report(**{**values, **fields})  # type: ignore[arg-type]
