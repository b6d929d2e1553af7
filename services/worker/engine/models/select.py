"""Finds a fused forward pass for a model."""

from __future__ import annotations

from transformers import PreTrainedModel

from services.worker.engine.models.base import StepModel
from services.worker.engine.models.llama import LlamaModel
from services.worker.engine.models.llama_weights import in_family, take_weights


def fused_model(model: PreTrainedModel, max_context_length: int) -> StepModel | None:
    """Returns a forward pass that is faster than the model's own; None if there is none.

    Args:
        model: Loaded with ``attn_implementation=ATTENTION_NAME``; works on, over weights that are
            shared with the result.
        max_context_length: Most tokens in a context.
    """
    if in_family(model, max_context_length):
        return LlamaModel(take_weights(model, max_context_length))
    return None
