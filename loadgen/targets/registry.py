"""Targets by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loadgen.errors import LoadgenError
from loadgen.targets.base import Target
from loadgen.targets.djinn import DjinnTarget
from loadgen.targets.options import OpenAIOptions

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

NAMES = ("djinn", "openai")
_OPENAI_DEFAULTS = OpenAIOptions()


async def connect(
    name: str,
    server: str,
    *,
    tenant: str = "",
    tracer_provider: TracerProvider | None = None,
    openai: OpenAIOptions = _OPENAI_DEFAULTS,
) -> Target:
    """Connects to a target.

    Args:
        name: One of `NAMES`.
        server: Where it is: host:port, or a URL.
        tenant: Whose agents those are that have no tenant of their own; empty: nobody's.
        tracer_provider: Records the client's spans; None: none are recorded.
        openai: How to speak to an OpenAI-compatible server.

    Raises:
        LoadgenError: There is no such target, or nobody answers.
    """
    if name == "djinn":
        return await DjinnTarget.connect(server, tenant=tenant, tracer_provider=tracer_provider)
    if name == "openai":
        # Imported for who drives one, like its HTTP library.
        from loadgen.targets.openai import OpenAITarget

        return await OpenAITarget.connect(server, openai, tenant=tenant)
    raise LoadgenError(f"--target {name}: known are {', '.join(NAMES)}")
