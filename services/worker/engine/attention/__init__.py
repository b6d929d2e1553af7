"""Attention over the paged device pool, behind one interface."""

from services.worker.engine.attention.base import (
    AttentionBackend,
    AttentionSpec,
    BackendFactory,
    Plan,
    StepShape,
)
from services.worker.engine.attention.select import select_backend

__all__ = [
    "AttentionBackend",
    "AttentionSpec",
    "BackendFactory",
    "Plan",
    "StepShape",
    "select_backend",
]
