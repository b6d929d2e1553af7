"""transformers' modules: what is found at warm-up, and what of them is compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModelForCausalLM, PretrainedConfig

from services.common.errors import ConfigError
from services.worker.engine.attention import AttentionSpec, Plan, StepShape, select_backend
from services.worker.engine.kv_layout import KVLayout
from services.worker.engine.model_loader import LoadedModel
from services.worker.engine.models.any import (
    ATTENTION_NAME,
    AnyModel,
    CheckedAttention,
    register_attention,
)
from tests.support.model_driver import driving, nan_pool

TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def loaded_from(kind: str, **settings: object) -> LoadedModel:
    """A model whose configuration nobody has checked."""
    register_attention()
    dtype = settings.pop("dtype", torch.float32)
    assert isinstance(dtype, torch.dtype)
    config: PretrainedConfig = getattr(transformers, kind + "Config")(**(TINY | settings))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config, dtype=dtype, attn_implementation=ATTENTION_NAME
    ).eval()
    heads = config.num_attention_heads
    return LoadedModel(
        model=model,
        name="m",
        vocab_size=config.vocab_size,
        max_context_length=64,
        eos_token_ids=(),
        num_layers=config.num_hidden_layers,
        num_query_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        dtype=dtype,
        device=torch.device("cpu"),
        fingerprint="",
    )


def warm_up(loaded: LoadedModel) -> None:
    with driving(loaded) as driver:
        driver.runner.warm_up()


GROUPED = {"num_key_value_heads": 2, "head_dim": 16}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("Llama", GROUPED),
        ("Qwen3", GROUPED),
        ("Olmo2", {"num_key_value_heads": 2}),
        ("Granite", {"num_key_value_heads": 1}),
        ("Mixtral", GROUPED | {"num_local_experts": 4}),
        ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
        ("GPT2", {}),
    ],
)
def test_plain_models_pass(kind: str, settings: dict[str, object]) -> None:
    warm_up(loaded_from(kind, **settings))


@pytest.mark.parametrize(
    ("kind", "settings", "line"),
    [
        (
            "Mistral",
            GROUPED | {"sliding_window": 8},
            "--model m: MistralAttention attends with sliding_window=8",
        ),
        ("Gemma2", GROUPED | {"sliding_window": 64}, "Gemma2Attention attends with softcap=50.0"),
        ("Bert", {"is_decoder": False}, "not supported"),
        ("Bloom", {"n_layer": 2, "n_head": 4}, "--model m: .*not supported"),
    ],
)
def test_a_model_that_attends_in_its_own_way_is_refused(
    kind: str, settings: dict[str, object], line: str
) -> None:
    loaded = loaded_from(kind, **settings)
    with pytest.raises(ConfigError, match=line):
        warm_up(loaded)


def test_a_layer_that_does_not_use_the_interface_is_noticed() -> None:
    loaded = loaded_from("Llama")

    class NoAttention(torch.nn.Module):
        def forward(
            self, hidden_states: torch.Tensor, **_kwargs: object
        ) -> tuple[torch.Tensor, None]:
            return hidden_states, None

    loaded.model.model.layers[1].self_attn = NoAttention()
    with pytest.raises(ConfigError, match="1 of 2 layers attend through"):
        warm_up(loaded)


def spoil_rotary(model: Any) -> None:
    model.model.rotary_emb.forward = lambda x, position_ids: (
        torch.ones(1, position_ids.shape[1], 8) * (1 if position_ids[0, 0] else 0.2),
        torch.zeros(1, position_ids.shape[1], 8),
    )


@pytest.mark.parametrize("spoil", [spoil_rotary])
def test_logits_unlike_those_of_the_models_own_attention_are_noticed(
    spoil: Callable[[Any], None],
) -> None:
    loaded = loaded_from("Llama", initializer_range=0.5)
    spoil(loaded.model)
    with pytest.raises(ConfigError, match="its layers attend in a way of their own"):
        warm_up(loaded)


class Steps:
    """Computes the first tokens of one sequence at a time, over a pool of NaN."""

    def __init__(self, loaded: LoadedModel) -> None:
        layout = KVLayout(loaded.num_layers, 8, loaded.num_kv_heads, loaded.head_dim, loaded.dtype)
        spec = AttentionSpec(layout, loaded.num_query_heads, loaded.device)
        self._loaded = loaded
        self.model = AnyModel(loaded.model)
        self._attention = select_backend("sdpa")(spec, layout.view(nan_pool(layout, 8)))

    def __call__(self, count: int) -> torch.Tensor:
        with torch.inference_mode():
            return self.model.forward(*self._inputs(count), self._attention, self._plan(count))

    def checked(self, count: int) -> torch.Tensor:
        kv_heads, head_dim = self._loaded.num_kv_heads, self._loaded.head_dim
        attention = CheckedAttention(
            self._attention,
            self._plan(count),
            kv_heads=kv_heads,
            head_dim=head_dim,
            max_context_length=self._loaded.max_context_length,
        )
        with torch.inference_mode():
            return self.model.forward_checked(*self._inputs(count), attention)

    def _inputs(self, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        tokens = torch.arange(count)
        return tokens, tokens, tokens[-1:]

    def _plan(self, count: int) -> Plan:
        slots = np.arange(count)
        shape = StepShape([count], [count], [[0, 1, 2]], int(count == 1), slots)
        return self._attention.plan(shape)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("kind", ["Llama", "GPTNeoX"])
def test_layers_share_what_is_compiled_whatever_the_number_of_tokens(kind: str) -> None:
    # In bfloat16: on a CPU, the products of float32 layers are each their own.
    loaded = loaded_from(kind, dtype=torch.bfloat16, num_hidden_layers=4)
    steps = Steps(loaded)
    counts = (7, 1, 9, 20)
    expected = [steps(count) for count in counts]
    compiler = CompileCounterWithBackend("eager")
    steps.model.compile_layers(compiler)
    for count, logits in zip(counts, expected, strict=True):
        torch.testing.assert_close(steps(count), logits, rtol=0.02, atol=0.02)
    compiled = compiler.frame_count
    assert 0 < compiled <= 10
    for count in (2, 1, 12, 3, 17):
        steps(count)
    assert compiler.frame_count == compiled


@pytest.mark.usefixtures("fresh_compiler")
def test_checks_at_warm_up_compile_nothing() -> None:
    steps = Steps(loaded_from("GPTNeoX", dtype=torch.bfloat16))
    compiler = CompileCounterWithBackend("eager")
    steps.model.compile_layers(compiler)
    checked = steps.checked(6)
    with torch.inference_mode():
        reference = steps.model.reference(torch.arange(6))
    assert compiler.frame_count == 0
    torch.testing.assert_close(checked[0], reference, rtol=0.02, atol=0.02)
    steps(6)
    assert compiler.frame_count > 0


@pytest.fixture
def sync_modes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    return modes


def test_modules_that_wait_are_told_from_those_that_do_not(sync_modes: list[str]) -> None:
    model = AnyModel(loaded_from("Llama").model)

    def fail(message: str) -> Callable[[], None]:
        def forward() -> None:
            if sync_modes and sync_modes[-1] == "error":
                raise RuntimeError(message)

        return forward

    assert model.only_launches(lambda: None)
    assert not model.only_launches(fail("called a synchronizing CUDA operation"))
    with pytest.raises(RuntimeError, match="out of memory"):
        model.only_launches(fail("out of memory"))
    assert sync_modes == ["error", "default"] * 3


@pytest.mark.usefixtures("fresh_compiler", "sync_modes")
def test_layers_that_do_not_compile_stay_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    steps = Steps(loaded_from("Llama", dtype=torch.bfloat16))
    expected = steps(5)

    def broken(_graph: object, _inputs: object) -> Callable[..., object]:
        raise NotImplementedError("no such GPU")

    steps.model.compile_layers(broken)
    assert steps.model.only_launches(lambda: steps(5))
    assert "the layers are not compiled" in caplog.text
    assert torch.equal(steps(5), expected)
