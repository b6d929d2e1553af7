"""Decode speed on a CPU: Djinn's model runner beside transformers and vLLM.

    python -m bench.cpu_decode --dtype float32 --json result.json

Every peer gets the same prompts and generates the same number of tokens, greedily, in the same
dtype. Rounds of all peers take turns, so that whatever else runs on the machine slows all alike;
each figure is the median of its rounds. vLLM runs in a virtual environment of its own, named by
``--vllm-python``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from services.common.errors import ConfigError
from services.common.model_files import smollm2_folder
from services.worker.config import EngineConfig
from services.worker.engine.kv_layout import KVLayout
from services.worker.engine.model_loader import LoadedModel, load
from services.worker.engine.model_runner import ModelRunner
from services.worker.engine.models.any import ATTENTION_NAME
from services.worker.engine.step import SampleRequest, SequenceSlice, StepPlan
from services.worker.engine.streams import CpuStream, Wakeup
from services.worker.messages import SamplingParams

BLOCK_SIZE_TOKENS = 16
GREEDY = SamplingParams()


@dataclass(frozen=True, slots=True)
class Round:
    """One measured run of one peer.

    Attributes:
        first_s: From the start to the last sequence's first token.
        decode_tokens_per_s: All sequences together, after that.
        tokens: What was generated, sequence by sequence.
    """

    first_s: float
    decode_tokens_per_s: float
    tokens: list[list[int]]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: medians of a peer's rounds.

    Attributes:
        ratio: Djinn's decode speed over this peer's; above 1, Djinn is faster.
        same_tokens: Share of the generated tokens that are the same as `generate`'s.
    """

    peer: str
    first_s: float
    decode_tokens_per_s: float
    ratio: float
    same_tokens: float


def measure_djinn(
    loaded: LoadedModel, prompts: Sequence[Sequence[int]], count: int
) -> Callable[[], Round]:
    """Returns what runs one round through `ModelRunner`, over a pool in scrambled order."""
    layout = KVLayout(
        loaded.num_layers,
        BLOCK_SIZE_TOKENS,
        loaded.num_kv_heads,
        loaded.head_dim,
        loaded.dtype,
    )
    needed = [-(-(len(prompt) + count) // BLOCK_SIZE_TOKENS) for prompt in prompts]
    pool = torch.zeros(sum(needed), layout.block_bytes, dtype=torch.uint8)
    stream = CpuStream("compute", Wakeup())
    runner = ModelRunner(loaded, layout, layout.view(pool), stream)
    runner.warm_up()
    order = torch.randperm(sum(needed), generator=torch.Generator().manual_seed(0)).tolist()
    tables = [[order.pop() for _ in range(blocks)] for blocks in needed]

    def run() -> Round:
        logs = [list(prompt) for prompt in prompts]
        start = time.perf_counter()
        first = start
        for step in range(count):
            parts = [
                SequenceSlice(
                    log if step == 0 else log[-1:],
                    0 if step == 0 else len(log) - 1,
                    table,
                    SampleRequest(GREEDY, len(log)),
                )
                for log, table in zip(logs, tables, strict=True)
            ]
            # A prompt at a time, as a token budget would cut them; then all decodes together.
            steps = [(part,) for part in parts] if step == 0 else [tuple(parts)]
            chosen = [
                sample.token_id
                for cut in steps
                for sample in runner.launch(StepPlan(cut)).result().samples
                if sample is not None
            ]
            for log, token in zip(logs, chosen, strict=True):
                log.append(token)
            if step == 0:
                first = time.perf_counter()
        spent = time.perf_counter() - first
        made = [log[len(prompt) :] for log, prompt in zip(logs, prompts, strict=True)]
        return Round(first - start, len(prompts) * (count - 1) / spent, made)

    return run


class _Clock(StoppingCriteria):  # type: ignore[misc]  # transformers has no types
    """Notes when each token was chosen and never stops."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(
        self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object
    ) -> torch.Tensor:
        """Called by `generate` after each step."""
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def measure_generate(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], count: int
) -> Callable[[], Round]:
    """Returns what runs one round through transformers' `generate`, padded on the left."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    seen = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])

    def run() -> Round:
        clock = _Clock()
        start = time.perf_counter()
        with _attention(model, "sdpa"):
            made = model.generate(
                ids,
                attention_mask=seen,
                max_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([clock]),
            )
        spent = clock.times[-1] - clock.times[0]
        speed = len(prompts) * (count - 1) / spent
        return Round(clock.times[0] - start, speed, made[:, longest:].tolist())

    return run


def measure_generate_batch(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], count: int
) -> Callable[[], Round]:
    """Returns what runs one round through transformers' continuous batching."""
    longest = max(len(prompt) for prompt in prompts) + count
    blocks = len(prompts) * -(-longest // 32) + 8
    batching = ContinuousBatchingConfig(
        block_size=32, num_blocks=blocks, max_batch_tokens=max(256, len(prompts))
    )
    generation = GenerationConfig(
        max_new_tokens=count, do_sample=False, eos_token_id=-1, pad_token_id=0
    )

    def run() -> Round:
        start = time.perf_counter()
        with _attention(model, "paged|sdpa"):
            outputs = model.generate_batch(
                [list(prompt) for prompt in prompts],
                generation_config=generation,
                continuous_batching_config=batching,
                record_timestamps=True,
            )
        made = sorted(outputs.items(), key=lambda item: int(item[0].rsplit("_", 1)[-1]))
        times = sorted(time for _, output in made for time in output.timestamps)
        first = max(output.timestamps[0] for _, output in made)
        later = [time for time in times if time > first]
        speed = len(later) / (later[-1] - first)
        return Round(first - start, speed, [list(o.generated_tokens) for _, o in made])

    return run


class _attention:  # noqa: N801 - reads as a verb where it is used
    """Runs a block under another of transformers' attention implementations."""

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        self._model = model
        self._name = name

    def __enter__(self) -> None:
        self._model.set_attn_implementation(self._name)

    def __exit__(self, *_: object) -> None:
        self._model.set_attn_implementation(ATTENTION_NAME)


def measure_vllm(
    python: Path, model: Path, dtype: str, prompts: Sequence[Sequence[int]], count: int
) -> Round:
    """Runs all rounds in vLLM's own virtual environment and returns their median."""
    request = {
        "model": str(model),
        "dtype": dtype,
        "prompts": [list(prompt) for prompt in prompts],
        "new_tokens": count,
    }
    script = Path(__file__).with_name("vllm_decode.py")
    with tempfile.TemporaryDirectory(prefix="djinn-bench-") as folder:
        # Not by stdout: vLLM's processes log there.
        result = Path(folder) / "answer.json"
        subprocess.run(
            [python, script, result],
            input=json.dumps(request),
            stdout=sys.stderr,
            text=True,
            check=True,
            # By default vLLM takes half of the machine's memory for KV, which others may need.
            env={"VLLM_CPU_KVCACHE_SPACE": "2", **os.environ, "PYTHONPATH": ""},
        )
        answer = json.loads(result.read_text())
    return Round(answer["first_s"], answer["decode_tokens_per_s"], answer["tokens"])


def summarize(rounds: dict[str, list[Round]], reference: str) -> list[Row]:
    """Returns the table.

    Args:
        rounds: Of each peer, Djinn's first.
        reference: The peer whose tokens the others' are compared with.
    """
    medians = {
        peer: statistics.median(one.decode_tokens_per_s for one in done)
        for peer, done in rounds.items()
    }
    ours = next(iter(medians.values()))
    expected = rounds[reference][0].tokens
    return [
        Row(
            peer=peer,
            first_s=statistics.median(one.first_s for one in done),
            decode_tokens_per_s=medians[peer],
            ratio=ours / medians[peer],
            same_tokens=_same(done[0].tokens, expected),
        )
        for peer, done in rounds.items()
    ]


def _same(tokens: list[list[int]], expected: list[list[int]]) -> float:
    pairs = [
        (a, b)
        for one, other in zip(tokens, expected, strict=True)
        for a, b in zip(one, other, strict=False)
    ]
    return sum(a == b for a, b in pairs) / len(pairs)


def make_prompts(count: int, tokens: int, spread: float, vocab_size: int) -> list[list[int]]:
    """Returns seeded prompts of `tokens` down to ``tokens * (1 - spread)`` tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths = [round(tokens * (1 - spread * index / max(count - 1, 1))) for index in range(count)]
    return [
        torch.randint(100, vocab_size, (length,), generator=generator).tolist()
        for length in lengths
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(prog="bench.cpu_decode", description=__doc__)
    parser.add_argument("--model", default="smollm2", help="as djinn-worker's --model")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=8, help="sequences")
    parser.add_argument("--context", type=int, default=512, help="tokens of the longest prompt")
    parser.add_argument(
        "--spread", type=float, default=0.2, help="how much shorter the shortest prompt is, 0 to 1"
    )
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None, help="default: torch's choice")
    parser.add_argument("--vllm-python", type=Path, help="python of an environment with vLLM")
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args(argv)
    try:
        loaded = load(
            EngineConfig(model=args.model, dtype=args.dtype, cpu_threads=args.threads),
            lambda _what, _done: None,
        )
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    # Nobody stops early: all generate the same number of tokens.
    loaded.model.generation_config.eos_token_id = None
    prompts = make_prompts(args.batch, args.context, args.spread, loaded.vocab_size)
    peers = {
        "djinn": measure_djinn(loaded, prompts, args.new_tokens),
        "transformers generate": measure_generate(loaded.model, prompts, args.new_tokens),
    }
    if importlib.util.find_spec("psutil") is None:
        print("generate_batch left out: it needs the package psutil", file=sys.stderr)
    else:
        peers["transformers generate_batch"] = measure_generate_batch(
            loaded.model, prompts, args.new_tokens
        )
    rounds: dict[str, list[Round]] = {peer: [] for peer in peers}
    for turn in range(args.rounds):
        for peer, run in peers.items():
            rounds[peer].append(run())
            speed = rounds[peer][-1].decode_tokens_per_s
            print(f"round {turn + 1}: {peer}: {speed:.1f} tokens/s", file=sys.stderr)
    if args.vllm_python is not None:
        folder = smollm2_folder() if args.model == "smollm2" else Path(args.model)
        rounds["vLLM (CPU)"] = [
            measure_vllm(args.vllm_python, folder, args.dtype, prompts, args.new_tokens)
        ]
    rows = summarize(rounds, "transformers generate")
    print(f"{'':28} {'first tokens':>12} {'decode tok/s':>12} {'djinn/peer':>10} {'same':>6}")
    for row in rows:
        print(
            f"{row.peer:28} {row.first_s:10.2f} s {row.decode_tokens_per_s:12.1f}"
            f" {row.ratio:10.2f} {row.same_tokens:6.1%}"
        )
    if args.json is not None:
        result = {
            "benchmark": "cpu_decode",
            "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
            "machine": {
                "processor": platform.processor() or platform.machine(),
                "cpus": os.cpu_count(),
                "torch_threads": torch.get_num_threads(),
            },
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "rows": [asdict(row) for row in rows],
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
