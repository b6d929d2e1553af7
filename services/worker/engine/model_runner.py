"""Runs one step of the model: all tokens of a `StepPlan` in one forward pass, then sampling.

Sampled tokens stay on the device, where the step launched next finds those that it follows; so a
step can be launched before the host knows what the one before it sampled.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from services.common.errors import ConfigError
from services.worker.engine.attention import AttentionSpec, select_backend
from services.worker.engine.kv_layout import KVLayout
from services.worker.engine.model_loader import LoadedModel
from services.worker.engine.models.any import AnyModel, CheckedAttention
from services.worker.engine.models.base import StepModel
from services.worker.engine.models.select import fused_model
from services.worker.engine.sampler import SamplingBatch, follow, sample, sampled_buffer
from services.worker.engine.step import (
    SampledToken,
    SampleRequest,
    SequenceSlice,
    StepPlan,
    StepResult,
)
from services.worker.engine.step_input import HostStep, prepare
from services.worker.engine.step_timer import Mark, mark
from services.worker.engine.streams import Event, Stream
from services.worker.engine.tensors import download, upload
from services.worker.messages import PositionLogprobs, SamplingParams, TokenLogprob

if TYPE_CHECKING:
    from services.worker.engine.step_graphs import StepGraphs

_WARM_UP_TOKENS = 40
# How like its own a model's logits must be: cosine of the angle between them.
_LIKENESS = {torch.float32: 0.9999, torch.bfloat16: 0.97, torch.float16: 0.97}


@dataclass(frozen=True, slots=True)
class _Output:
    """What a step made; in host memory once the step's event is reached.

    Attributes:
        tokens: int64 ``[n]``, -1 where the logits are not numbers.
        chosen: float32 ``[n]``, log-probability of `tokens`; None if nobody asked.
        top: Log-probabilities and token ids ``[n, most asked for]``; None if nobody asked.
        logits: float32 ``[n, vocab_size]``; None if nobody asked.
    """

    tokens: torch.Tensor
    chosen: torch.Tensor | None
    top: tuple[torch.Tensor, torch.Tensor] | None
    logits: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class _Marks:
    """When a step ran.

    Attributes:
        before: End of the step launched before; None if there was none.
        start: When the model's work began.
        end: When all was done.
    """

    before: Mark | None
    start: Mark
    end: Mark


class LaunchedStep:
    """See `PendingStep`."""

    def __init__(self, plan: StepPlan, requests: list[SampleRequest]) -> None:
        self._plan = plan
        self._requests = requests
        self._output: _Output | None = None
        self._marks: _Marks | None = None
        self._event: Event | None = None

    def done(self) -> bool:
        """See `PendingStep.done`."""
        assert self._event is not None
        return self._event.query()

    def result(self) -> StepResult:
        """See `PendingStep.result`."""
        assert self._event is not None
        self._event.synchronize()
        assert self._output is not None
        assert self._marks is not None
        marks = self._marks
        wanted = [i for i, part in enumerate(self._plan.slices) if part.sample is not None]
        tokens: list[int] = self._output.tokens.tolist()
        chosen = dict(zip(wanted, _samples(self._requests, tokens, self._output), strict=True))
        failed = frozenset(i for i, token in zip(wanted, tokens, strict=True) if token < 0)
        return StepResult(
            tuple(None if i in failed else chosen.get(i) for i in range(len(self._plan.slices))),
            failed,
            busy_s=marks.start.seconds_until(marks.end),
            gap_s=0.0 if marks.before is None else marks.before.seconds_until(marks.start),
        )

    def _launched(self, event: Event) -> None:
        self._event = event

    def _finish(self, output: _Output, marks: _Marks) -> None:
        self._output = output
        self._marks = marks


class ModelRunner:
    """Runs steps on the compute stream, one after another."""

    def __init__(
        self,
        loaded: LoadedModel,
        layout: KVLayout,
        kv: torch.Tensor,
        compute: Stream,
        *,
        attention: str = "auto",
        max_running_sequences: int = 64,
        any_model: bool = False,
    ) -> None:
        """Binds a model to a device pool.

        Args:
            loaded: The model.
            layout: The pool's layout.
            kv: The pool as ``layout.view`` shows it. Every block may be used.
            compute: Where all device work is launched.
            attention: Name of an attention backend, or ``auto``.
            max_running_sequences: Most sequences of a step.
            any_model: Run transformers' modules even where there is a faster forward pass.

        Raises:
            ConfigError: There is no such backend, or it does not take this model.
        """
        self._loaded = loaded
        self._layout = layout
        self._num_blocks = kv.shape[0]
        self._compute = compute
        self._max_sequences = max_running_sequences
        self._own = AnyModel(loaded.model)
        fused = None if any_model else fused_model(loaded.model, loaded.max_context_length)
        self._model: StepModel = fused or self._own
        self._graphs: StepGraphs | None = None
        spec = AttentionSpec(layout, loaded.num_query_heads, loaded.device)
        self._attention = select_backend(attention)(spec, kv)
        # A captured step samples after each of its sequences, those that pad it included.
        self._sampled = sampled_buffer(2 * max_running_sequences, loaded.device)
        self._sampled_before: dict[int, int] = {}
        self._end: Mark | None = None

    @property
    def attention_name(self) -> str:
        """Name of the attention backend in use."""
        return self._attention.name

    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Queues a step on the compute stream without waiting for anything.

        Args:
            plan: What to compute; at least one slice. What `follows` another follows the plan that
                was launched last.

        Returns:
            The step, whose `result` has one entry per slice.
        """
        step = prepare(plan, self._layout.block_size_tokens, self._sampled_before)
        self._sampled_before = step.sampled
        launched = LaunchedStep(plan, step.requests)
        for event in plan.after:
            self._compute.wait(event)
        self._compute.launch(lambda: launched._finish(*self._run(step)))
        launched._launched(self._compute.record())
        return launched

    def warm_up(self, report: Callable[[str, float], None] | None = None) -> None:
        """Runs a few steps, so that requests find everything in place; blocks until done.

        On a GPU whose attention allows it, steps are captured in CUDA graphs.

        A short text is computed in three pieces, over two blocks if there are two, and compared
        with what transformers' own attention makes of it.

        Writes to the pool's first blocks: call it before anything lives there.

        Args:
            report: Told what is being done and the fraction done.

        Raises:
            ConfigError: The model attends in a way that is not supported.
        """
        size = self._layout.block_size_tokens
        blocks = [1, 0] if self._num_blocks > 1 else [0]
        length = min(_WARM_UP_TOKENS, size * len(blocks), self._loaded.max_context_length)
        text = [(7 * i + 3) % self._loaded.vocab_size for i in range(max(length, 1))]
        self._build(report or _tell_nobody)
        failures: list[ConfigError] = []
        self._compute.launch(lambda: self._check(text, blocks, failures))
        self._compute.record().synchronize()
        if failures:
            raise failures[0]
        self._capture(report or _tell_nobody)
        sampling = SamplingParams(temperature=1.0, top_k=2, top_p=0.5)
        wanted = SampleRequest(sampling, position=length, logprobs=1)
        last = SequenceSlice(text[-1:], len(text) - 1, blocks, wanted)
        self.launch(StepPlan((last,))).result()

    def _run(self, step: HostStep) -> tuple[_Output, _Marks]:
        device = self._loaded.device
        starts: list[Mark] = []
        with torch.inference_mode():
            made = None
            if self._graphs is not None:
                made = self._graphs.run(step, lambda: starts.append(mark(device)))
            batch = SamplingBatch(
                [request.params for request in step.requests],
                [request.position for request in step.requests],
            )
            if made is None:
                attention_plan = self._attention.plan(step.shape)
                starts.append(mark(device))
                token_ids = upload(step.token_ids, device)
                logits = self._model.forward(
                    follow(token_ids, upload(step.follows, device), self._sampled),
                    upload(step.positions, device),
                    upload(step.rows, device),
                    self._attention,
                    attention_plan,
                ).float()
                tokens = sample(logits, batch)
            else:
                logits = made.logits
                tokens = made.likeliest if batch.greedy else sample(logits, batch)
            if made is None or tokens is not made.likeliest or not made.in_place:
                self._sampled[: len(tokens)] = tokens
            output = _take_out(logits, tokens, step.requests)
            (start,) = starts
            before, self._end = self._end, mark(device)
            return output, _Marks(before, start, self._end)

    def _build(self, report: Callable[[str, float], None]) -> None:
        if self._attention.name != "flashinfer":
            return
        from services.worker.engine.attention.flashinfer import FlashInferBackend

        backend = self._attention
        assert isinstance(backend, FlashInferBackend)
        report("building attention kernels", 0.0)

        def build() -> None:
            with torch.inference_mode():
                backend.build(self._loaded.max_context_length)

        self._compute.launch(build)
        self._compute.record().synchronize()
        report("building attention kernels", 1.0)

    def _capture(self, report: Callable[[str, float], None]) -> None:
        if self._attention.name != "flashinfer":
            return
        if self._model is self._own and not self._can_capture_own(report):
            return
        from services.worker.engine.attention.flashinfer import FlashInferBackend
        from services.worker.engine.step_graphs import StepGraphs

        assert isinstance(self._attention, FlashInferBackend)
        graphs = StepGraphs(
            self._model,
            self._attention,
            self._sampled,
            vocab_size=self._loaded.vocab_size,
            max_sequences=self._max_sequences,
            max_context_length=self._loaded.max_context_length,
            block_size=self._layout.block_size_tokens,
            device=self._loaded.device,
        )

        def capture() -> None:
            with torch.inference_mode():
                graphs.capture(report)

        self._compute.launch(capture)
        self._compute.record().synchronize()
        self._graphs = graphs

    def _can_capture_own(self, report: Callable[[str, float], None]) -> bool:
        """Compiles transformers' modules; returns True if they launch nothing but kernels."""
        report("compiling layers", 0.0)
        self._own.compile_layers()
        wanted = SampleRequest(SamplingParams(), position=2)
        step = prepare(
            StepPlan((SequenceSlice([0, 0], 0, [0], wanted),)), self._layout.block_size_tokens, {}
        )
        device = self._loaded.device
        found: list[bool] = []

        def probe() -> None:
            with torch.inference_mode():
                token_ids, positions, rows = (
                    upload(array, device) for array in (step.token_ids, step.positions, step.rows)
                )
                plan = self._attention.plan(step.shape)
                found.append(
                    self._own.only_launches(
                        lambda: self._own.forward(token_ids, positions, rows, self._attention, plan)
                    )
                )

        self._compute.launch(probe)
        self._compute.record().synchronize()
        report("compiling layers", 1.0)
        return found == [True]

    def _check(self, text: list[int], blocks: list[int], failures: list[ConfigError]) -> None:
        # Caught here, or the compute stream would fail all that comes after.
        try:
            with torch.inference_mode():
                self._compare(text, blocks)
        except ConfigError as error:
            failures.append(ConfigError(f"--model {self._loaded.name}: {error}"))

    def _compare(self, text: list[int], blocks: list[int]) -> None:
        loaded = self._loaded
        device = loaded.device
        last = len(text) - 1
        logits = torch.empty(0)
        bounds = sorted({0, last // 2, last, len(text)})
        for start, end in itertools.pairwise(bounds):
            wanted = SampleRequest(SamplingParams(), position=end)
            part = SequenceSlice(text[start:end], start, blocks, wanted)
            step = prepare(StepPlan((part,)), self._layout.block_size_tokens, {})
            if self._model is not self._own:
                logits = self._model.forward(
                    upload(step.token_ids, device),
                    upload(step.positions, device),
                    upload(step.rows, device),
                    self._attention,
                    self._attention.plan(step.shape),
                )
                continue
            attention = CheckedAttention(
                self._attention,
                self._attention.plan(step.shape),
                kv_heads=loaded.num_kv_heads,
                head_dim=loaded.head_dim,
                max_context_length=loaded.max_context_length,
            )
            logits = self._own.forward_checked(
                upload(step.token_ids, device),
                upload(step.positions, device),
                upload(step.rows, device),
                attention,
            )
            if sorted(attention.layers) != list(range(loaded.num_layers)):
                raise ConfigError(
                    f"{len(attention.layers)} of {loaded.num_layers} layers attend through"
                    " transformers' attention interface: not supported"
                )
        reference = self._own.reference(torch.tensor(text, device=device)).double()
        likeness = torch.cosine_similarity(reference, logits[0].double(), dim=0)
        if not likeness >= _LIKENESS[loaded.dtype]:
            raise ConfigError(
                "its layers attend in a way of their own: logits are"
                f" {float(likeness):.4f} like those of its own attention, not supported"
            )


def _tell_nobody(_what: str, _done: float) -> None:
    return


def _take_out(logits: torch.Tensor, tokens: torch.Tensor, requests: list[SampleRequest]) -> _Output:
    chosen = top = None
    most = max((r.logprobs for r in requests if r.logprobs is not None), default=None)
    if most is not None:
        # Of the raw logits: what the model thinks, whatever the temperature.
        logprobs = logits.log_softmax(dim=-1)
        chosen = download(logprobs.gather(1, tokens.clamp(min=0)[:, None])[:, 0])
        values, ids = logprobs.topk(min(most, logits.shape[-1]), dim=-1)
        top = download(values), download(ids)
    wants_logits = any(r.return_logits for r in requests)
    return _Output(download(tokens), chosen, top, download(logits) if wants_logits else None)


def _samples(
    requests: list[SampleRequest], tokens: list[int], output: _Output
) -> list[SampledToken]:
    return [
        SampledToken(
            token_id=token,
            logprobs=_logprobs(output, i, token, request.logprobs),
            logits=output.logits[i].numpy().astype("<f4").tobytes()
            if request.return_logits and output.logits is not None
            else None,
        )
        for i, (request, token) in enumerate(zip(requests, tokens, strict=True))
    ]


def _logprobs(output: _Output, row: int, token: int, count: int | None) -> PositionLogprobs | None:
    if count is None or output.chosen is None or output.top is None:
        return None
    values, ids = output.top
    return PositionLogprobs(
        chosen=TokenLogprob(token, float(output.chosen[row])),
        top=[
            TokenLogprob(int(i), float(v))
            for v, i in zip(values[row, :count].tolist(), ids[row, :count].tolist(), strict=True)
        ],
    )
