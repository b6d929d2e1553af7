from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys

import pytest

import djinn_client
from djinn_client import sync, testing


@pytest.mark.parametrize("module", [djinn_client, sync, testing])
def test_what_is_exported_exists_and_is_documented(module: object) -> None:
    names = module.__all__  # type: ignore[attr-defined]
    assert names == sorted(names, key=lambda name: (name.islower(), name)) or module is testing
    for name in names:
        thing = getattr(module, name)
        assert inspect.isclass(thing) or inspect.isfunction(thing) or name == "Prompt"
        assert name == "Prompt" or thing.__doc__, name


@pytest.mark.parametrize("module", [djinn_client, sync])
def test_public_methods_say_what_they_do(module: object) -> None:
    for name in ("Client", "Session", "Generation", "Admin"):
        kind = getattr(module, name)
        for member, value in vars(kind).items():
            if not member.startswith("_") and (inspect.isfunction(value)):
                assert value.__doc__, f"{name}.{member}"


def test_values_cannot_be_changed() -> None:
    for name in djinn_client.__all__:
        thing = getattr(djinn_client, name)
        if dataclasses.is_dataclass(thing):
            assert vars(thing)["__dataclass_params__"].frozen, name


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, djinn_client, djinn_client.sync, djinn_client.testing\n"
        "heavy = {'torch', 'transformers', 'numpy', 'services', 'loadgen', 'opentelemetry.sdk'}\n"
        "print(*sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=50
    )
    assert done.stdout.split() == []
