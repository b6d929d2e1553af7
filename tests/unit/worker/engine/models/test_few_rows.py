"""Products turned round are the same products, and only while switched on."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from services.worker.engine.models.few_rows import FewRows


class Sum(nn.Linear):
    """A linear layer with a mind of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum(-1, keepdim=True)


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 8), (3, 3), (1, 16), (2, 32), (1, 64), (1, 65), (1, 0), (5,)]
)
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_the_same(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(24, 40, bias=bias)
    x = torch.randn(*shape, 24)
    few_rows = FewRows(layer)
    with torch.inference_mode(), few_rows.switched_on():
        found = layer(x)
    assert found.is_contiguous()
    expected = x.double() @ layer.weight.double().t()
    if bias:
        expected = expected + layer.bias.double()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_it_is_off_outside_its_block_also_after_a_failure() -> None:
    layer = nn.Linear(2, 2)
    few_rows = FewRows(layer)
    seen = [few_rows.on]
    with few_rows.switched_on():
        seen.append(few_rows.on)
    seen.append(few_rows.on)
    with pytest.raises(RuntimeError), few_rows.switched_on():
        layer(torch.randn(1, 3))
    assert [*seen, few_rows.on] == [False, True, False, False]


def test_off_it_is_torchs_own_bit_for_bit() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 64)
    x = torch.randn(3, 64)
    expected = layer(x)
    FewRows(layer)
    assert torch.equal(layer(x), expected)


def test_other_layers_and_types_are_left_alone() -> None:
    model = nn.Sequential(Sum(4, 1), nn.Linear(4, 4, dtype=torch.bfloat16), nn.Embedding(3, 4))
    FewRows(model)
    assert all("forward" not in vars(module) for module in model)
