"""Fixtures that every kind of test uses."""

from __future__ import annotations

import os

import pytest

# Test processes share few cores with the servers they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

_OTEL = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


@pytest.fixture(autouse=True)
def no_collector_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps tests from sending spans to a collector that the environment names."""
    for name in _OTEL:
        monkeypatch.delenv(name, raising=False)
