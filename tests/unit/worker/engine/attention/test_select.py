"""Choosing an attention backend."""

from __future__ import annotations

import pytest

from services.common.errors import ConfigError
from services.worker.engine.attention import select_backend
from services.worker.engine.attention.sdpa import SdpaBackend


@pytest.mark.parametrize("name", ["auto", "sdpa"])
def test_sdpa_runs_everywhere(name: str) -> None:
    assert select_backend(name) is SdpaBackend


def test_an_unknown_name_is_told_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"--attention eager: unknown, use one of auto, .*sdpa"):
        select_backend("eager")
