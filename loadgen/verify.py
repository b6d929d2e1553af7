"""Proof that an evicted and restored KV cache gives the same outputs.

Each prompt lives three lives against a live server: twice undisturbed, and once with its KV evicted
in between, the freed device blocks overwritten and then reused by other sessions, and restored from
the host. The outputs after the wake must be the same: tokens equal, logits bitwise equal and close
within the seed's tolerance. The second undisturbed life tells whether the server repeats itself
bitwise at all. Each life has a tenant of its own, so that no block is shared between them.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

import djinn_client as djinn
from loadgen.errors import ServerError

RTOL = 1e-5
ATOL = 1e-8
TOOL_TOKENS = 32
FILLER_CONTEXTS = 16
"""Fillers hold at most this many times the context of the evicted session."""


class VerifyOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What to verify.

    Attributes:
        server: host:port of the scheduler.
        prompts: How many prompts.
        context_length: Tokens of each.
        new_tokens: Tokens generated before and after the eviction.
        seed: Of the prompts.
    """

    server: str
    prompts: int = 4
    context_length: int = 256
    new_tokens: int = 16
    seed: int = 0


class Comparison(msgspec.Struct, frozen=True):
    """Two generations side by side.

    Attributes:
        positions: Tokens compared.
        tokens_equal: The same ids.
        bitwise_equal: The same bits in every logit.
        close: As ``torch.allclose(rtol=1e-5)`` says; never with a NaN.
        max_abs_diff: Largest difference of two logits.
        max_rel_diff: The same, relative to the larger of the two.
    """

    positions: int
    tokens_equal: bool
    bitwise_equal: bool
    close: bool
    max_abs_diff: float
    max_rel_diff: float


class PromptResult(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt.

    Attributes:
        prompt: Its number.
        context_tokens: Tokens whose KV was evicted.
        repeatable: The two undisturbed lives are bitwise equal.
        before: Undisturbed against disturbed, before the eviction.
        after: The same after the wake.
        evicted_bytes: Bytes that the eviction copied to the host; blocks that were copied there
            before count nothing.
        filler_tokens: Tokens of other sessions that were put into the freed blocks.
        loaded_blocks: Blocks copied back at the wake.
        loaded_bytes: Bytes of them.
        recomputed_tokens: Tokens whose KV was computed again; must be 0 for the test to mean
            anything.
        passed: All is as it must be.
        problem: What is not.
    """

    prompt: int
    context_tokens: int
    repeatable: bool
    before: Comparison
    after: Comparison
    evicted_bytes: int
    filler_tokens: int
    loaded_blocks: int
    loaded_bytes: int
    recomputed_tokens: int
    passed: bool
    problem: str


class VerifyResult(msgspec.Struct, frozen=True, kw_only=True):
    """The whole verification.

    Attributes:
        server: Where.
        model: What it serves.
        dtype: Its element type.
        rtol: Relative tolerance of `Comparison.close`.
        atol: Absolute tolerance.
        prompts: Each prompt.
        passed: All of them passed.
    """

    server: str
    model: str
    dtype: str
    rtol: float
    atol: float
    prompts: list[PromptResult]
    passed: bool


class Output(msgspec.Struct, frozen=True):
    """One generation: ids, and each step's logits as little-endian float32."""

    token_ids: tuple[int, ...]
    logits: tuple[bytes, ...]


class Life(msgspec.Struct, frozen=True, kw_only=True):
    """What one session put out, and what happened to its KV in between.

    Attributes:
        before: Its first generation.
        after: Its second, after the eviction if there was one.
        context_tokens: Tokens of its context in between.
        evicted_bytes: As in `PromptResult`.
        filler_tokens: As in `PromptResult`.
        kv: Where the second generation found its KV.
    """

    before: Output
    after: Output
    context_tokens: int
    evicted_bytes: int
    filler_tokens: int
    kv: djinn.KvSource


def compare(one: Output, other: Output) -> Comparison:
    """Compares two generations; where one is shorter, what it lacks is a difference of tokens."""
    pairs = list(zip(one.logits, other.logits, strict=False))
    bitwise = one.logits == other.logits
    close = len(one.logits) == len(other.logits)
    max_abs = max_rel = 0.0
    for left_bytes, right_bytes in pairs:
        if left_bytes == right_bytes and np.isfinite(_floats(left_bytes)).all():
            continue
        left, right = _floats(left_bytes), _floats(right_bytes)
        if left.shape != right.shape or not (np.isfinite(left) & np.isfinite(right)).all():
            return Comparison(len(pairs), one.token_ids == other.token_ids, False, False, -1, -1)
        difference = np.abs(left.astype(np.float64) - right.astype(np.float64))
        larger = np.maximum(np.abs(left), np.abs(right)).astype(np.float64)
        max_abs = max(max_abs, float(difference.max()))
        relative = np.divide(difference, larger, out=np.zeros_like(larger), where=larger > 0)
        max_rel = max(max_rel, float(relative.max()))
        close = close and bool(np.allclose(right, left, rtol=RTOL, atol=ATOL))
    return Comparison(
        len(pairs), one.token_ids == other.token_ids, bitwise, close, max_abs, max_rel
    )


def _floats(data: bytes) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.frombuffer(data, dtype="<f4")


def judge(prompt: int, control: Life, repeat: Life, disturbed: Life) -> PromptResult:
    """Returns how one prompt fared.

    Args:
        prompt: Its number.
        control: Its undisturbed life.
        repeat: The same once more.
        disturbed: The one with the eviction.
    """
    repeatable = all(
        compare(one, other).bitwise_equal
        for one, other in ((control.before, repeat.before), (control.after, repeat.after))
    )
    after = compare(control.after, disturbed.after)
    problems = []
    if disturbed.kv.loaded_blocks == 0:
        problems.append("no block was copied back: nothing has been shown")
    if disturbed.kv.recomputed_tokens:
        problems.append(f"{disturbed.kv.recomputed_tokens} tokens were computed again")
    if after.positions == 0:
        problems.append("no logits came")
    if not after.tokens_equal:
        problems.append("tokens differ")
    if not after.close:
        problems.append(f"logits differ beyond rtol {RTOL:g}")
    elif not after.bitwise_equal and repeatable:
        problems.append("logits differ bitwise, and undisturbed they do not")
    return PromptResult(
        prompt=prompt,
        context_tokens=disturbed.context_tokens,
        repeatable=repeatable,
        before=compare(control.before, disturbed.before),
        after=after,
        evicted_bytes=disturbed.evicted_bytes,
        filler_tokens=disturbed.filler_tokens,
        loaded_blocks=disturbed.kv.loaded_blocks,
        loaded_bytes=disturbed.kv.loaded_bytes,
        recomputed_tokens=disturbed.kv.recomputed_tokens,
        passed=not problems,
        problem="; ".join(problems),
    )


async def run(options: VerifyOptions, say: Callable[[str], None]) -> VerifyResult:
    """Verifies a live server.

    Args:
        options: What to verify.
        say: Takes a line about each step.

    Raises:
        ServerError: The server cannot be reached, or refuses a step.
    """
    try:
        async with AsyncExitStack() as stack:
            return await _Verification(options, say, stack).run()
    except djinn.DjinnError as error:
        raise ServerError(f"--server {options.server}: {error.message}") from None


class _Verification:
    """See `run`."""

    def __init__(
        self, options: VerifyOptions, say: Callable[[str], None], stack: AsyncExitStack
    ) -> None:
        self._options = options
        self._say = say
        self._stack = stack
        # Nothing that an earlier verification left in the server's cache may be found.
        self._nonce = secrets.token_hex(4)

    async def run(self) -> VerifyResult:
        options = self._options
        clients = [await self._connect(name) for name in ("control", "repeat", "evicted", "filler")]
        model = await clients[0].model()
        needed = options.context_length + TOOL_TOKENS + 2 * options.new_tokens
        if needed > model.max_context_length:
            raise ServerError(
                f"--context-length {options.context_length}: {needed} tokens in all, and the limit "
                f"of {model.model} is {model.max_context_length}"
            )
        results = []
        for number in range(options.prompts):
            ids = random.Random(f"{options.seed}:verify:{number}")
            prompt = ids.choices(range(model.vocab_size), k=options.context_length)
            tool = ids.choices(range(model.vocab_size), k=TOOL_TOKENS)
            control = await self._live(clients[0], prompt, tool)
            repeat = await self._live(clients[1], prompt, tool)
            evicted = await self._live(clients[2], prompt, tool, clients[3])
            result = judge(number, control, repeat, evicted)
            self._say(
                f"prompt {number + 1} of {options.prompts}: "
                f"{'pass' if result.passed else 'FAIL: ' + result.problem}"
            )
            results.append(result)
        return VerifyResult(
            server=options.server,
            model=model.model,
            dtype=model.dtype,
            rtol=RTOL,
            atol=ATOL,
            prompts=results,
            passed=all(result.passed for result in results),
        )

    async def _connect(self, name: str) -> djinn.Client:
        client = await djinn.connect(self._options.server, tenant=f"verify-{self._nonce}-{name}")
        return await self._stack.enter_async_context(client)

    async def _live(
        self,
        client: djinn.Client,
        prompt: Sequence[int],
        tool: Sequence[int],
        filler: djinn.Client | None = None,
    ) -> Life:
        """Lives once; with `filler`, evicted in between."""
        async with AsyncExitStack() as fillers, client.session(name="verify") as session:
            before, _ = await self._generate(session, prompt)
            context_tokens = session.context_length
            evicted_bytes = filler_tokens = 0
            if filler is not None:
                await session.signal_phase("IO_WAIT", tool_name="verify")
                outcome = await client.admin.evict(session.session_id, mode="scrub")
                evicted_bytes = outcome.moved_bytes
                filler_tokens = await self._fill(filler, context_tokens, fillers)
                session.signal_phase("COMPUTE")
            after, kv = await self._generate(session, tool)
        return Life(
            before=before,
            after=after,
            context_tokens=context_tokens,
            evicted_bytes=evicted_bytes,
            filler_tokens=filler_tokens,
            kv=kv,
        )

    async def _generate(
        self, session: djinn.Session, prompt: Sequence[int]
    ) -> tuple[Output, djinn.KvSource]:
        generation = session.generate(
            list(prompt),
            max_tokens=self._options.new_tokens,
            ignore_eos=True,
            return_logits=True,
        )
        logits: list[bytes] = []
        async for piece in generation:
            logits.extend(piece.logits)
        result = await generation.result()
        return Output(result.token_ids, tuple(logits)), result.kv

    async def _fill(
        self, client: djinn.Client, context_tokens: int, fillers: AsyncExitStack
    ) -> int:
        """Opens sessions on the freed blocks, which stay open until the wake is over."""
        workers = await client.admin.workers()
        pool = max(
            (worker.device_blocks * worker.model.block_size_tokens for worker in workers),
            default=0,
        )
        wanted = min(pool, FILLER_CONTEXTS * context_tokens)
        ids = random.Random(f"{self._options.seed}:filler")
        vocab_size = workers[0].model.vocab_size if workers else 1
        filled = 0
        while filled < wanted:
            session = await fillers.enter_async_context(client.session(name="verify-filler"))
            prompt = ids.choices(range(vocab_size), k=self._options.context_length)
            await session.generate(prompt, max_tokens=1, ignore_eos=True).result()
            await session.signal_phase("IO_WAIT", tool_name="verify-filler")
            filled += session.context_length
        return filled


def to_json(result: VerifyResult) -> bytes:
    """Returns a result as JSON."""
    return msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n"


def show(result: VerifyResult, console: Console) -> None:
    """Prints a result."""
    console.print(
        f"{result.model} ({result.dtype}) at {result.server}: outputs after evict, reuse of the "
        "freed blocks, and restore, against undisturbed ones",
        highlight=False,
        markup=False,
    )
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("prompt", "tokens", "bitwise", f"rtol {result.rtol:g}", "max diff", "moved", ""):
        table.add_column(name)
    for prompt in result.prompts:
        after = prompt.after
        table.add_row(
            str(prompt.prompt),
            _yes(after.tokens_equal),
            _yes(after.bitwise_equal) + ("" if prompt.repeatable else " (nor undisturbed)"),
            _yes(after.close),
            f"{after.max_abs_diff:.3g}",
            f"{prompt.loaded_blocks} blocks, {prompt.loaded_bytes / 1e6:.1f} MB",
            "[green]pass[/]" if prompt.passed else f"[bold red]FAIL[/] {prompt.problem}",
        )
    console.print(table, highlight=False)


def _yes(equal: bool) -> str:
    return "equal" if equal else "differ"
