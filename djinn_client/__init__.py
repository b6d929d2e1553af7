"""The Djinn client: sessions of LLM agents whose KV cache sleeps while a tool runs.

::

    import djinn_client as djinn

    async with await djinn.connect("localhost:5556") as client:
        async with client.session(name="researcher") as agent:
            async for piece in agent.generate("Plan the search.", max_tokens=50):
                print(piece.text, end="")
            async with agent.tool("web_search", expected_s=12):
                result = await search()
            answer = await agent.generate_text(result)

`djinn_client.sync` has the same names for code without an event loop, `djinn_client.testing` a
server to test against.
"""

from djinn_client._admin import Admin
from djinn_client._client import Client, connect
from djinn_client._context import current_session, signal_phase
from djinn_client._errors import (
    ConnectError,
    ContextMismatchError,
    ContextTooLongError,
    DeadlineExceededError,
    DjinnError,
    DrainingError,
    EngineLostError,
    ExhaustedError,
    GenerationCancelledError,
    InternalError,
    InvalidRequestError,
    NoWorkerError,
    SessionBusyError,
    SessionClosedError,
    SessionExistsError,
    SessionNotFoundError,
    StaleGenerationError,
    UnavailableError,
    UnsupportedError,
    WorkerNotFoundError,
    WrongStateError,
)
from djinn_client._generation import Generation
from djinn_client._retry import RetryPolicy
from djinn_client._session import Session, ToolCall
from djinn_client._signals import PhaseSignal
from djinn_client._types import (
    CommandOutcome,
    Counters,
    EvictMode,
    FinishReason,
    GenerateOptions,
    GenerateResult,
    KvResidency,
    KvSource,
    ModelInfo,
    Phase,
    Piece,
    PoolInfo,
    PositionLogprobs,
    Prompt,
    SessionInfo,
    Stats,
    TokenLogprob,
    Turn,
    Usage,
    WorkerInfo,
    system,
    tool_result,
    user,
)

__all__ = [
    "Admin",
    "Client",
    "CommandOutcome",
    "ConnectError",
    "ContextMismatchError",
    "ContextTooLongError",
    "Counters",
    "DeadlineExceededError",
    "DjinnError",
    "DrainingError",
    "EngineLostError",
    "EvictMode",
    "ExhaustedError",
    "FinishReason",
    "GenerateOptions",
    "GenerateResult",
    "Generation",
    "GenerationCancelledError",
    "InternalError",
    "InvalidRequestError",
    "KvResidency",
    "KvSource",
    "ModelInfo",
    "NoWorkerError",
    "Phase",
    "PhaseSignal",
    "Piece",
    "PoolInfo",
    "PositionLogprobs",
    "Prompt",
    "RetryPolicy",
    "Session",
    "SessionBusyError",
    "SessionClosedError",
    "SessionExistsError",
    "SessionInfo",
    "SessionNotFoundError",
    "StaleGenerationError",
    "Stats",
    "TokenLogprob",
    "ToolCall",
    "Turn",
    "UnavailableError",
    "UnsupportedError",
    "Usage",
    "WorkerInfo",
    "WorkerNotFoundError",
    "WrongStateError",
    "connect",
    "current_session",
    "signal_phase",
    "system",
    "tool_result",
    "user",
]
