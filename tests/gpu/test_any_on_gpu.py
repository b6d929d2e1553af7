"""transformers' modules, compiled and captured in CUDA graphs, against their eager selves."""

from __future__ import annotations

from array import array

import pytest
import torch

from services.worker.engine.step import SampleRequest, SequenceSlice, StepPlan
from tests.support.gpu_models import BLOCK_SIZE, GREEDY, PROMPTS, generate, make, make_runner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_compiled_and_captured_modules_give_what_eager_ones_give() -> None:
    loaded = make("GPTNeoX", torch.bfloat16, num_attention_heads=2, num_key_value_heads=2)
    eager = make_runner(loaded)
    captured = make_runner(loaded, max_running_sequences=8)
    captured.warm_up()
    assert captured._graphs is not None
    made, logits = generate(captured, PROMPTS, 12, GREEDY)
    # The layers stay compiled: what is not has to be asked for.
    with torch.compiler.set_stance("force_eager"):
        for prompt, tokens, rows in zip(PROMPTS, made, logits, strict=True):
            text = prompt + tokens[:-1]
            table = array("i", range(-(-len(text) // BLOCK_SIZE)))
            wanted = SampleRequest(GREEDY, len(text), return_logits=True)
            part = SequenceSlice(text, 0, table, wanted)
            (sample,) = eager.launch(StepPlan((part,))).result().samples
            assert sample is not None
            assert sample.logits is not None
            expected = torch.frombuffer(bytearray(sample.logits), dtype=torch.float32)
            assert torch.cosine_similarity(rows[-1], expected, dim=0) > 0.995


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_modules_that_wait_for_the_gpu_are_not_captured() -> None:
    loaded = make("Llama", torch.bfloat16, num_key_value_heads=2)
    loaded.model.model.layers[0].register_forward_hook(
        lambda _module, _inputs, output: output if float(output.sum()) < 1e30 else None
    )
    runner = make_runner(loaded, max_running_sequences=2, any_model=True)
    runner.warm_up()
    assert runner._graphs is None
    made, _ = generate(runner, PROMPTS[:2], 3, GREEDY)
    assert [len(tokens) for tokens in made] == [3, 3]
