"""Targets by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loadgen.errors import LoadgenError
from loadgen.targets.base import Target
from loadgen.targets.djinn import DjinnTarget

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

NAMES = ("djinn",)


async def connect(
    name: str, server: str, *, tenant: str = "", tracer_provider: TracerProvider | None = None
) -> Target:
    """Connects to a target.

    Args:
        name: One of `NAMES`.
        server: Where it is: host:port.
        tenant: Whose agents those are that have no tenant of their own; empty: nobody's.
        tracer_provider: Records the client's spans; None: none are recorded.

    Raises:
        LoadgenError: There is no such target, or nobody answers.
    """
    if name == "djinn":
        return await DjinnTarget.connect(server, tenant=tenant, tracer_provider=tracer_provider)
    raise LoadgenError(f"--target {name}: known are {', '.join(NAMES)}")
