"""The backend over torch's `varlen_attn`, which is faked: there is no GPU here to run it.

The fake does what torch documents: it reads K and V through the table of blocks, as many tokens of
each sequence as are in use, and attends causally with the new tokens last.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from services.common.errors import ConfigError
from services.worker.engine.attention import AttentionSpec, StepShape, select_backend
from services.worker.engine.attention import torch_varlen as module
from services.worker.engine.attention.sdpa import SdpaBackend
from services.worker.engine.kv_layout import KVLayout
from tests.support.model_driver import nan_pool

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LAYOUT = KVLayout(2, 4, 2, 8, torch.bfloat16)


def fake_varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
) -> torch.Tensor:
    assert cu_seq_k is None
    assert window_size == (-1, 0)
    assert query.is_contiguous()
    assert {tensor.dtype for tensor in (cu_seq_q, seqused_k, block_table)} == {torch.int32}
    assert max_q == int(cu_seq_q.diff().max())
    assert max_k == int(seqused_k.max())
    repeats = query.shape[1] // key.shape[2]
    assert enable_gqa == (repeats > 1)
    made = []
    for i, length in enumerate(seqused_k.tolist()):
        q = query[cu_seq_q[i] : cu_seq_q[i + 1]].float()
        k, v = (
            pool[block_table[i].long()].flatten(0, 1)[:length].repeat_interleave(repeats, 1).float()
            for pool in (key, value)
        )
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu_(length - len(q) + 1)
        weights = scores.masked_fill_(hidden, -torch.inf).softmax(-1)
        made.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(made).to(query.dtype)


def spec_of(device: torch.device = CUDA, **layout: object) -> AttentionSpec:
    fields = {"num_layers": 2, "block_size_tokens": 4, "num_kv_heads": 2, "head_dim": 8}
    return AttentionSpec(KVLayout(**(fields | {"dtype": torch.bfloat16} | layout)), 4, device)  # type: ignore[arg-type]


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A Hopper GPU with FlashAttention 3; returns what is activated."""
    active: list[str] = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    monkeypatch.setattr(module, "_varlen_attn", lambda: fake_varlen_attn)
    monkeypatch.setattr(module, "_is_installed", lambda name: name == "flash_attn_interface")
    # Tensors stay where they are: the host.
    monkeypatch.setattr(module, "upload", lambda array, _device: torch.from_numpy(array))
    monkeypatch.setattr(
        torch.nn.attention,
        "current_flash_attention_impl",
        lambda: active[-1] if active else None,
        raising=False,
    )
    monkeypatch.setattr(
        torch.nn.attention, "activate_flash_attention_impl", active.append, raising=False
    )
    return active


@pytest.mark.parametrize("query_heads", [2, 4])
def test_it_attends_as_sdpa_does(hopper: list[str], query_heads: int) -> None:
    kv = [LAYOUT.view(nan_pool(LAYOUT, 8)) for _ in range(2)]
    ours = select_backend("torch_varlen")(AttentionSpec(LAYOUT, query_heads, CUDA), kv[0])
    theirs = SdpaBackend(AttentionSpec(LAYOUT, query_heads, CPU), kv[1])
    tables = [[5, 1, 7], [2, 0, 4]]
    generator = torch.Generator().manual_seed(0)
    lengths = [0, 0]
    # Prompts, then a decode beside a chunk, then decodes.
    for new in ([6, 3], [1, 4], [1, 1]):
        starts, lengths = lengths, [a + b for a, b in zip(lengths, new, strict=True)]
        slots = [
            table[place // 4] * 4 + place % 4
            for table, start, end in zip(tables, starts, lengths, strict=True)
            for place in range(start, end)
        ]
        decodes = sum(1 for count in new if count == 1)
        step = StepShape(new, lengths, tables, decodes, np.array(slots, dtype=np.int64))
        plans = ours.plan(step), theirs.plan(step)
        for layer in range(2):
            query, key, value = (
                torch.randn(sum(new), heads, 8, generator=generator).to(torch.bfloat16)
                for heads in (query_heads, 2, 2)
            )
            made, expected = (
                backend.attend(plan, layer, query, key, value, 0.3)
                for backend, plan in zip((ours, theirs), plans, strict=True)
            )
            torch.testing.assert_close(made, expected, rtol=0.02, atol=0.02)
    assert torch.equal(kv[0].nan_to_num(), kv[1].nan_to_num())
    assert hopper == ["FA3"]


def test_torch_is_switched_once(hopper: list[str]) -> None:
    spec = spec_of()
    for _ in range(2):
        module.TorchVarlenBackend(spec, spec.layout.view(nan_pool(spec.layout, 2)))
    assert hopper == ["FA3"]


def test_what_cannot_be_activated_is_refused(
    hopper: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_name: str) -> None:
        raise RuntimeError("no forward kernels")

    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", fail, raising=False)
    with pytest.raises(ConfigError, match="--attention torch_varlen: no forward kernels"):
        module.TorchVarlenBackend(spec_of(), torch.empty(0))


@pytest.mark.usefixtures("hopper")
def test_it_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.why_not(spec_of()) is None
    assert module.why_not(spec_of(CPU)) == "needs a CUDA device"
    assert module.why_not(spec_of(dtype=torch.float32)) == (
        "needs bfloat16 or float16, and not float32"
    )
    assert module.why_not(spec_of(head_dim=512)) == "has no kernels for heads of 512 elements"

    def old(query: torch.Tensor, cu_seq_q: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def patched(name: str, value: Callable[..., object]) -> str | None:
        with monkeypatch.context() as context:
            context.setattr(module, name, value)
            return module.why_not(spec_of())

    for attend in (None, old):
        reason = patched("_varlen_attn", lambda attend=attend: attend)
        assert reason is not None
        assert reason.endswith("has no varlen_attn that takes a block_table")
    assert patched("_is_installed", lambda _name: False) == (
        "flash_attn_interface is not installed"
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 0))
    assert module.why_not(spec_of()) == "needs a Hopper or Blackwell GPU"


def test_it_is_refused_without_a_gpu() -> None:
    with pytest.raises(ConfigError, match="--attention torch_varlen: needs a CUDA device"):
        select_backend("torch_varlen")(spec_of(CPU), torch.empty(0))


def test_it_comes_after_flashinfer(hopper: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from services.worker.engine.attention import flashinfer

    spec = spec_of()
    kv = spec.layout.view(nan_pool(spec.layout, 2))
    monkeypatch.setattr(flashinfer, "why_not", lambda _spec: "is not installed")
    assert select_backend("auto")(spec, kv).name == "torch_varlen"
    assert hopper == ["FA3"]


def test_missing_modules_are_missed() -> None:
    assert module._is_installed("torch")
    assert not module._is_installed("no_such_module")
    assert not module._is_installed("no_such_package.inner")
