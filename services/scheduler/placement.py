"""Which worker a session goes to: a pure function of the workers' views."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from services.common.errors import NoWorkerError, UnsupportedError
from services.scheduler.policy.view import WorkerView


def candidates(
    workers: Iterable[WorkerView], model: str, *, lost_models: Collection[str] = ()
) -> list[WorkerView]:
    """Returns the workers on which a session may be placed.

    Args:
        workers: All that are connected.
        model: The model wanted; empty: any.
        lost_models: Models of workers that were connected and may come back.

    Returns:
        One or more.

    Raises:
        NoWorkerError: None is connected, or those that serve the model are lost or draining.
        UnsupportedError: Others are connected, and none serves the model.
    """
    everyone = list(workers)
    if not everyone:
        raise no_worker("no worker is connected")
    serving = [worker for worker in everyone if not model or worker.model == model]
    if not serving:
        served = ", ".join(sorted({worker.model for worker in everyone}))
        problem = f"no worker serves model {model!r}; those connected serve {served}"
        if model in lost_models:
            raise no_worker(problem)
        raise UnsupportedError(f"model: {problem}", metadata={"model": model, "served": served})
    ready = [worker for worker in serving if not worker.draining]
    if not ready:
        raise no_worker(f"all {len(serving)} workers that could serve this are draining")
    return ready


def roomiest(workers: Iterable[WorkerView], expected_tokens: int = 0) -> WorkerView:
    """Returns the worker with the most free capacity.

    Of equals, the one with the fewest sessions, then the first by id.

    Args:
        workers: One or more.
        expected_tokens: Tokens the session is expected to hold; 0: unknown.
    """
    return min(workers, key=lambda worker: _rank(worker, expected_tokens))


def expected_blocks(worker: WorkerView, expected_tokens: int) -> int:
    """Returns how many blocks a new session is expected to need on a worker.

    Without an estimate it is taken for the average of the worker's sessions.
    """
    if expected_tokens and worker.block_size_tokens:
        return -(-expected_tokens // worker.block_size_tokens)
    used = worker.device.used + worker.device.reclaimable + worker.host.used
    return max(1, used // max(1, worker.sessions))


def no_worker(message: str) -> NoWorkerError:
    """Returns the error for a session that cannot be placed now."""
    return NoWorkerError(message, retry_after_s=1.0)


def _rank(worker: WorkerView, expected_tokens: int) -> tuple[int, int, int, str]:
    device = worker.device.free + worker.device.reclaimable
    host = worker.host.free + worker.host.reclaimable
    free = device + host - worker.unreported_blocks
    # A worker whose device has room serves at once; room on the host alone means evicting first.
    fits = device - worker.unreported_blocks >= expected_blocks(worker, expected_tokens)
    return (0 if fits else 1, -free, worker.sessions, worker.worker_id)
