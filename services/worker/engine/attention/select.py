"""Chooses an attention backend by name, or by what the machine has."""

from __future__ import annotations

import torch

from services.common.errors import ConfigError
from services.worker.engine.attention import torch_varlen
from services.worker.engine.attention.base import AttentionBackend, AttentionSpec, BackendFactory
from services.worker.engine.attention.sdpa import SdpaBackend


def _flashinfer(spec: AttentionSpec, kv: torch.Tensor) -> AttentionBackend:
    # Imported late: it takes kernels that only a GPU's torch has.
    from services.worker.engine.attention.flashinfer import FlashInferBackend

    return FlashInferBackend(spec, kv)


def _fastest(spec: AttentionSpec, kv: torch.Tensor) -> AttentionBackend:
    if spec.device.type == "cuda":
        from services.worker.engine.attention.flashinfer import FlashInferBackend, why_not

        if why_not(spec) is None:
            return FlashInferBackend(spec, kv)
        if torch_varlen.why_not(spec) is None:
            return torch_varlen.TorchVarlenBackend(spec, kv)
    return SdpaBackend(spec, kv)


_BACKENDS: dict[str, BackendFactory] = {
    "auto": _fastest,
    "flashinfer": _flashinfer,
    "sdpa": SdpaBackend,
    "torch_varlen": torch_varlen.TorchVarlenBackend,
}


def select_backend(name: str) -> BackendFactory:
    """Returns what makes the backend.

    Args:
        name: A backend's name, or ``auto`` for the fastest that runs here.

    Raises:
        ConfigError: There is no such backend.
    """
    try:
        return _BACKENDS[name]
    except KeyError:
        known = ", ".join(sorted(_BACKENDS))
        raise ConfigError(f"--attention {name}: unknown, use one of {known}") from None
