"""Decodes with vLLM, in vLLM's own virtual environment.

Reads a request from stdin and writes the answer to the file that is its argument. The speed of
decoding alone is what many tokens cost more than one.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def main() -> int:
    """Runs vLLM on the request; returns the exit code."""
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found, unused-ignore]

    request = json.load(sys.stdin)
    prompts = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]
    llm = LLM(
        model=request["model"],
        dtype=request["dtype"],
        enforce_eager=True,
        max_num_seqs=len(prompts),
        max_model_len=max(map(len, request["prompts"])) + request["new_tokens"],
        enable_prefix_caching=False,
    )

    def run(count: int) -> tuple[float, list[list[int]]]:
        params = SamplingParams(
            temperature=0.0, max_tokens=count, min_tokens=count, ignore_eos=True
        )
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        spent = time.perf_counter() - start
        return spent, [list(output.outputs[0].token_ids) for output in outputs]

    run(4)
    firsts: list[float] = []
    alls: list[float] = []
    tokens: list[list[int]] = []
    for _ in range(3):
        firsts.append(run(1)[0])
        spent, tokens = run(request["new_tokens"])
        alls.append(spent)
    first = sorted(firsts)[1]
    decoded = len(prompts) * (request["new_tokens"] - 1)
    answer = {
        "first_s": first,
        "decode_tokens_per_s": decoded / (sorted(alls)[1] - first),
        "tokens": tokens,
    }
    Path(sys.argv[1]).write_text(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
