"""Djinn itself, through its client library."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Awaitable
from typing import TYPE_CHECKING

import djinn_client as djinn
from loadgen.errors import ServerError
from loadgen.record import KvFound
from loadgen.targets.base import Delta, Generation, Outcome, TargetError, TargetInfo
from loadgen.workload import ChatPrompt, Prompt, TokenPrompt

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

RETRY = djinn.RetryPolicy(give_up_s=180.0)
"""A server that is killed and started again takes a while to load its model."""


def failure(error: djinn.DjinnError) -> TargetError:
    """Returns a client's error as the load generator records it."""
    return TargetError(error.reason, error.message, error.retry_after_s)


class DjinnTarget:
    """A connection to a scheduler; use `connect`."""

    name = "djinn"

    def __init__(
        self, client: djinn.Client, server: str, tracer_provider: TracerProvider | None
    ) -> None:
        self._client = client
        self._server = server
        self._tracer_provider = tracer_provider
        self._tenants: dict[str, djinn.Client] = {}
        self._connecting = asyncio.Lock()

    @classmethod
    async def connect(
        cls, server: str, *, tenant: str = "", tracer_provider: TracerProvider | None = None
    ) -> DjinnTarget:
        """Connects to a scheduler.

        Args:
            server: host:port.
            tenant: Whose agents those are that have no tenant of their own.
            tracer_provider: Records the client's spans; None: none are recorded.

        Raises:
            ServerError: Nobody answers there, or not as a scheduler does.
        """
        try:
            client = await djinn.connect(
                server, tenant=tenant, retry=RETRY, tracer_provider=tracer_provider
            )
        except djinn.DjinnError as error:
            raise ServerError(error.message) from None
        return cls(client, server, tracer_provider)

    async def info(self) -> TargetInfo:
        try:
            model = await self._client.model()
            stats = await self._client.admin.stats()
        except djinn.DjinnError as error:
            raise failure(error) from error
        return TargetInfo(
            vocab_size=model.vocab_size,
            max_context_length=model.max_context_length,
            has_chat=model.has_chat_template,
            has_tokenizer=model.has_tokenizer,
            model=dataclasses.asdict(model),
            policy=stats.policy,
        )

    async def stats(self) -> dict[str, float]:
        try:
            stats = await self._client.admin.stats()
        except djinn.DjinnError as error:
            raise failure(error) from error
        values: dict[str, float] = dict(dataclasses.asdict(stats.counters))
        for side, pool in (("device", stats.device), ("host", stats.host)):
            values |= {f"{side}_{name}": n for name, n in dataclasses.asdict(pool).items()}
        values |= {f"sessions_{phase.value.lower()}": n for phase, n in stats.phases.items()}
        values["uptime_s"] = stats.uptime_s
        if stats.answer_time_s is not None:
            values["answer_time_s"] = stats.answer_time_s
        if stats.report_time_s is not None:
            values["report_time_s"] = stats.report_time_s
        return values

    def session(self, name: str, tenant: str, first_prompt_tokens: int) -> DjinnSession:
        return DjinnSession(self, name, tenant, first_prompt_tokens)

    async def client_of(self, tenant: str) -> djinn.Client:
        """Returns the connection that speaks for a tenant; empty: for the target's own."""
        if not tenant:
            return self._client
        async with self._connecting:
            if tenant not in self._tenants:
                self._tenants[tenant] = await djinn.connect(
                    self._server,
                    tenant=tenant,
                    retry=RETRY,
                    tracer_provider=self._tracer_provider,
                )
            return self._tenants[tenant]

    async def aclose(self) -> None:
        for client in (*self._tenants.values(), self._client):
            await client.aclose()


class DjinnSession:
    """One agent's session."""

    def __init__(
        self, target: DjinnTarget, name: str, tenant: str, first_prompt_tokens: int
    ) -> None:
        self._target = target
        self._name = name
        self._tenant = tenant
        self._first_prompt_tokens = first_prompt_tokens
        self._opened: djinn.Session | None = None

    @property
    def session_id(self) -> str:
        return "" if self._opened is None else self._opened.session_id or ""

    @property
    def _session(self) -> djinn.Session:
        if self._opened is None:
            raise TargetError("NOT_OPEN", "the session has not been opened")
        return self._opened

    async def open(self) -> None:
        try:
            if self._opened is None:
                client = await self._target.client_of(self._tenant)
                self._opened = client.session(
                    name=self._name, expected_prompt_tokens=self._first_prompt_tokens
                )
            # Who comes again keeps its place in the queue by its session's id.
            await self._opened.open()
        except djinn.DjinnError as error:
            raise failure(error) from error

    def generate(self, prompt: Prompt, max_tokens: int, timeout_s: float) -> Generation:
        return _DjinnGeneration(self._session, prompt, max_tokens, timeout_s)

    def tool_started(self, name: str, expected_s: float | None) -> Awaitable[None]:
        try:
            return _answer(
                self._session.signal_phase("IO_WAIT", tool_name=name, expected_s=expected_s)
            )
        except djinn.DjinnError as error:
            raise failure(error) from error

    def tool_ended(self) -> None:
        try:
            self._session.signal_phase("COMPUTE")
        except djinn.DjinnError as error:
            raise failure(error) from error

    async def close(self) -> None:
        if self._opened is None:
            return
        try:
            await self._opened.aclose()
        except djinn.DjinnError as error:
            raise failure(error) from error


class _DjinnGeneration:
    """See `base.Generation`."""

    def __init__(
        self, session: djinn.Session, prompt: Prompt, max_tokens: int, timeout_s: float
    ) -> None:
        self._session = session
        self._prompt = prompt
        self._max_tokens = max_tokens
        self._timeout_s = timeout_s
        self._running: djinn.Generation | None = None

    async def __aiter__(self) -> AsyncIterator[Delta]:
        try:
            running = self._running = self._session.generate(
                _client_prompt(self._prompt),
                max_tokens=self._max_tokens,
                # Random ids lead a model anywhere, also to its end-of-sequence.
                ignore_eos=isinstance(self._prompt, TokenPrompt),
                timeout_s=self._timeout_s,
            )
            async for piece in running:
                yield Delta(len(piece.token_ids), piece.text, piece.token_ids)
        except djinn.DjinnError as error:
            raise failure(error) from error

    async def outcome(self) -> Outcome:
        if self._running is None:
            raise TargetError("NOT_STARTED", "the generation has not been started")
        try:
            result = await self._running.result()
        except djinn.DjinnError as error:
            raise failure(error) from error
        kv = result.kv
        return Outcome(
            finish_reason=result.finish_reason.value,
            prompt_tokens=result.usage.prompt_tokens,
            cached_tokens=result.usage.cached_tokens,
            prefilled_tokens=result.usage.prefilled_tokens,
            queue_s=result.queue_s,
            kv=KvFound(
                held_blocks=kv.held_blocks,
                resident_blocks=kv.resident_blocks,
                loaded_blocks=kv.loaded_blocks,
                loaded_bytes=kv.loaded_bytes,
                recomputed_tokens=kv.recomputed_tokens,
                prefix_hit_tokens=kv.prefix_hit_tokens,
                load_s=kv.load_s,
            ),
            resends=result.resumptions,
        )


async def _answer(signal: Awaitable[object]) -> None:
    try:
        await signal
    except djinn.DjinnError as error:
        raise failure(error) from error


def _client_prompt(prompt: Prompt) -> list[int] | list[djinn.Turn]:
    if isinstance(prompt, ChatPrompt):
        return [djinn.Turn(turn.role, turn.content) for turn in prompt.turns]
    return prompt.ids
