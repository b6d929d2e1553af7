"""Forward passes over a flat row of tokens."""

from services.worker.engine.models.base import StepModel

__all__ = ["StepModel"]
