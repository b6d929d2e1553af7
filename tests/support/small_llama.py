"""A Llama small enough for every test, with heads of the size that GPU kernels are made for."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from services.worker.engine.kv_layout import KVLayout

VOCAB = 640
MAX_CONTEXT = 1024


def write_small_llama(folder: Path) -> str:
    """Writes a checkpoint with random float32 weights; returns what ``--model`` takes."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
        max_position_embeddings=MAX_CONTEXT,
        # Large enough that the likeliest token changes with the context.
        initializer_range=0.2,
        pad_token_id=None,
        eos_token_id=None,
        bos_token_id=None,
    )
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return str(folder)


def kv_layout(block_size_tokens: int, dtype: torch.dtype) -> KVLayout:
    """Returns what its blocks look like."""
    return KVLayout(
        num_layers=3, block_size_tokens=block_size_tokens, num_kv_heads=2, head_dim=128, dtype=dtype
    )
