from __future__ import annotations

import pytest

from services.common import gpu
from services.common.errors import ConfigError


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> object:
    def make(count: int, *, torch_has_cuda: bool = True) -> None:
        monkeypatch.setattr(gpu, "cuda_device_count", lambda: count)
        monkeypatch.setattr(gpu, "torch_has_cuda", lambda: torch_has_cuda)

    return make


@pytest.mark.parametrize(("asked", "device"), [(None, "cuda:0"), (0, "cuda:0"), (1, "cuda:1")])
def test_a_gpu_that_is_there_is_used(machine, asked: int | None, device: str) -> None:
    machine(2)

    assert gpu.choose_device(asked) == (device, None)


def test_a_gpu_that_is_not_among_those_there_is_refused_with_their_number(machine) -> None:
    machine(2)

    with pytest.raises(ConfigError, match=r"^--gpu 2: this machine has 2 \(0 to 1\)$"):
        gpu.choose_device(2)


def test_without_gpus_the_cpu_is_used_and_said_so_if_one_was_asked_for(machine) -> None:
    machine(0)

    assert gpu.choose_device(None) == ("cpu", None)
    assert gpu.choose_device(0) == ("cpu", "--gpu 0: no CUDA GPU found, using the CPU")


def test_a_torch_without_cuda_is_said(machine) -> None:
    machine(1, torch_has_cuda=False)

    device, line = gpu.choose_device(None)

    assert device == "cpu"
    assert line is not None
    assert "built without CUDA" in line


def test_what_it_finds_here_agrees_with_torch() -> None:
    torch = pytest.importorskip("torch")

    assert gpu.torch_has_cuda() == (torch.version.cuda is not None)
    if torch.version.cuda is not None:
        assert gpu.cuda_device_count() == torch.cuda.device_count()
