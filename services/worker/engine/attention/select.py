"""Chooses an attention backend by name, or by what the machine has."""

from __future__ import annotations

from services.common.errors import ConfigError
from services.worker.engine.attention.base import BackendFactory
from services.worker.engine.attention.sdpa import SdpaBackend

_BACKENDS: dict[str, BackendFactory] = {"sdpa": SdpaBackend}


def select_backend(name: str) -> BackendFactory:
    """Returns what makes the backend.

    Args:
        name: A backend's name, or ``auto`` for the fastest that runs here.

    Raises:
        ConfigError: There is no such backend.
    """
    if name == "auto":
        return SdpaBackend
    try:
        return _BACKENDS[name]
    except KeyError:
        known = ", ".join(["auto", *sorted(_BACKENDS)])
        raise ConfigError(f"--attention {name}: unknown, use one of {known}") from None
