"""Runs one step of the model: all tokens of a `StepPlan` in one forward pass, then sampling."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from services.common.errors import ConfigError
from services.worker.engine.attention import AttentionSpec, StepShape, select_backend
from services.worker.engine.kv_layout import KVLayout
from services.worker.engine.model_loader import LoadedModel
from services.worker.engine.models.any import AnyModel, CheckedAttention
from services.worker.engine.sampler import SamplingBatch, sample
from services.worker.engine.step import (
    SampledToken,
    SampleRequest,
    SequenceSlice,
    StepPlan,
    StepResult,
)
from services.worker.engine.streams import Event, Stream
from services.worker.engine.tensors import download, upload
from services.worker.messages import PositionLogprobs, SamplingParams, TokenLogprob

_WARM_UP_TOKENS = 40
# How like its own a model's logits must be: cosine of the angle between them.
_LIKENESS = {torch.float32: 0.9999, torch.bfloat16: 0.97, torch.float16: 0.97}


@dataclass(frozen=True, slots=True)
class _HostStep:
    """A step's inputs in host memory.

    Attributes:
        token_ids: int64 ``[T]``.
        positions: int64 ``[T]``.
        rows: int64 ``[n]``, the last token of each slice to be sampled after.
        requests: How to sample, for each of `rows`.
    """

    shape: StepShape
    token_ids: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    requests: list[SampleRequest]


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


class LaunchedStep:
    """See `PendingStep`."""

    def __init__(self, plan: StepPlan, requests: list[SampleRequest]) -> None:
        self._plan = plan
        self._requests = requests
        self._output: _Output | None = None
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
        wanted = [i for i, part in enumerate(self._plan.slices) if part.sample is not None]
        tokens: list[int] = self._output.tokens.tolist()
        chosen = dict(zip(wanted, _samples(self._requests, tokens, self._output), strict=True))
        failed = frozenset(i for i, token in zip(wanted, tokens, strict=True) if token < 0)
        return StepResult(
            tuple(None if i in failed else chosen.get(i) for i in range(len(self._plan.slices))),
            failed,
        )

    def _launched(self, event: Event) -> None:
        self._event = event

    def _finish(self, output: _Output) -> None:
        self._output = output


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
    ) -> None:
        """Binds a model to a device pool.

        Args:
            loaded: The model.
            layout: The pool's layout.
            kv: The pool as ``layout.view`` shows it. Every block may be used.
            compute: Where all device work is launched.
            attention: Name of an attention backend, or ``auto``.

        Raises:
            ConfigError: There is no such backend, or it does not take this model.
        """
        self._loaded = loaded
        self._layout = layout
        self._num_blocks = kv.shape[0]
        self._compute = compute
        self._model = AnyModel(loaded.model)
        spec = AttentionSpec(layout, loaded.num_query_heads, loaded.device)
        self._attention = select_backend(attention)(spec, kv)

    @property
    def attention_name(self) -> str:
        """Name of the attention backend in use."""
        return self._attention.name

    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Queues a step on the compute stream without waiting for anything.

        Args:
            plan: What to compute; at least one slice.

        Returns:
            The step, whose `result` has one entry per slice.
        """
        step = _prepare(plan, self._layout.block_size_tokens)
        launched = LaunchedStep(plan, step.requests)
        self._compute.launch(lambda: launched._finish(self._run(step)))
        launched._launched(self._compute.record())
        return launched

    def warm_up(self) -> None:
        """Runs a few steps, so that requests find everything in place; blocks until done.

        A short text is computed in three pieces, over two blocks if there are two, and compared
        with what transformers' own attention makes of it.

        Writes to the pool's first blocks: call it before anything lives there.

        Raises:
            ConfigError: The model attends in a way that is not supported.
        """
        size = self._layout.block_size_tokens
        blocks = [1, 0] if self._num_blocks > 1 else [0]
        length = min(_WARM_UP_TOKENS, size * len(blocks), self._loaded.max_context_length)
        text = [(7 * i + 3) % self._loaded.vocab_size for i in range(max(length, 1))]
        failures: list[ConfigError] = []
        self._compute.launch(lambda: self._check(text, blocks, failures))
        self._compute.record().synchronize()
        if failures:
            raise failures[0]
        sampling = SamplingParams(temperature=1.0, top_k=2, top_p=0.5)
        wanted = SampleRequest(sampling, position=length, logprobs=1)
        last = SequenceSlice(text[-1:], len(text) - 1, blocks, wanted)
        self.launch(StepPlan((last,))).result()

    def _run(self, step: _HostStep) -> _Output:
        device = self._loaded.device
        with torch.inference_mode():
            attention_plan = self._attention.plan(step.shape)
            logits = self._model.forward(
                upload(step.token_ids, device),
                upload(step.positions, device),
                upload(step.rows, device),
                self._attention,
                attention_plan,
            )
            return _choose(logits.float(), step.requests)

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
            step = _prepare(StepPlan((part,)), self._layout.block_size_tokens)
            attention = CheckedAttention(
                self._attention,
                self._attention.plan(step.shape),
                kv_heads=loaded.num_kv_heads,
                head_dim=loaded.head_dim,
                max_context_length=loaded.max_context_length,
            )
            logits = self._model.forward_checked(
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
        reference = self._model.reference(torch.tensor(text, device=device)).double()
        likeness = torch.cosine_similarity(reference, logits[0].double(), dim=0)
        if not likeness >= _LIKENESS[loaded.dtype]:
            raise ConfigError(
                "its layers attend in a way of their own: logits are"
                f" {float(likeness):.4f} like those of its own attention, not supported"
            )


def _prepare(plan: StepPlan, block_size: int) -> _HostStep:
    """Lays a plan out as flat rows; no device work."""
    slices = plan.slices
    query_lengths = [len(part.token_ids) for part in slices]
    positions = np.concatenate(
        [np.arange(p.start, p.start + n) for p, n in zip(slices, query_lengths, strict=True)]
    )
    blocks = np.concatenate(
        [
            np.repeat(
                np.array(p.block_table, dtype=np.int64)[
                    p.start // block_size : (p.start + n - 1) // block_size + 1
                ],
                block_size,
            )[p.start % block_size :][:n]
            for p, n in zip(slices, query_lengths, strict=True)
        ]
    )
    ends = np.cumsum(query_lengths) - 1
    wanted = [i for i, part in enumerate(slices) if part.sample is not None]
    return _HostStep(
        shape=StepShape(
            query_lengths=query_lengths,
            kv_lengths=[p.start + n for p, n in zip(slices, query_lengths, strict=True)],
            block_tables=[part.block_table for part in slices],
            num_decodes=sum(1 for _ in itertools.takewhile(lambda n: n == 1, query_lengths)),
            slots=blocks * block_size + positions % block_size,
        ),
        token_ids=np.concatenate([np.array(p.token_ids, dtype=np.int64) for p in slices]),
        positions=positions.astype(np.int64),
        rows=ends[wanted].astype(np.int64),
        requests=[part.sample for part in slices if part.sample is not None],
    )


def _choose(logits: torch.Tensor, requests: list[SampleRequest]) -> _Output:
    batch = SamplingBatch([r.params for r in requests], [r.position for r in requests])
    tokens = sample(logits, batch)
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
