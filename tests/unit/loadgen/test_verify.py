import io
import struct

import msgspec
import numpy as np
import pytest
from rich.console import Console

import djinn_client as djinn
from loadgen import verify
from loadgen.verify import Life, Output


def output(*rows, ids=(1, 2)) -> Output:
    return Output(tuple(ids), tuple(struct.pack(f"<{len(row)}f", *row) for row in rows))


ONE = output([1.0, -2.0, 3.0], [4.0, 5.0, 6.0])


def life(after=ONE, before=ONE, **kv) -> Life:
    return Life(
        before=before,
        after=after,
        context_tokens=10,
        evicted_bytes=3,
        filler_tokens=20,
        kv=djinn.KvSource(**({"loaded_blocks": 2, "loaded_bytes": 64} | kv)),
    )


def test_equal_outputs():
    found = verify.compare(ONE, output([1.0, -2.0, 3.0], [4.0, 5.0, 6.0]))
    assert (found.tokens_equal, found.bitwise_equal, found.close) == (True, True, True)
    assert (found.positions, found.max_abs_diff) == (2, 0.0)


def test_the_last_bit_counts_bitwise_and_not_for_the_tolerance():
    near = float(np.nextafter(np.float32(3.0), np.float32(4.0)))
    found = verify.compare(ONE, output([1.0, -2.0, near], [4.0, 5.0, 6.0]))
    assert (found.bitwise_equal, found.close) == (False, True)
    assert found.max_abs_diff == pytest.approx(2.4e-7, rel=0.1)
    assert found.max_rel_diff == pytest.approx(8e-8, rel=0.1)


def test_differences_beyond_the_tolerance():
    found = verify.compare(ONE, output([1.0, -2.0, 3.001], [4.0, 5.0, 6.0]))
    assert not found.close
    assert found.max_abs_diff == pytest.approx(0.001, rel=0.01)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_a_number_is_never_equal_not_even_to_itself(bad):
    broken = output([1.0, bad], [1.0, 2.0])
    found = verify.compare(broken, broken)
    assert (found.bitwise_equal, found.close) == (False, False)


def test_missing_positions_and_other_sizes_are_differences():
    shorter = output([1.0, -2.0, 3.0], ids=(1,))
    found = verify.compare(ONE, shorter)
    assert (found.tokens_equal, found.bitwise_equal, found.close) == (False, False, False)
    assert not verify.compare(ONE, output([1.0], [2.0])).close


def test_a_prompt_passes_if_all_is_the_same_and_something_was_moved():
    result = verify.judge(0, life(), life(), life())
    assert (result.passed, result.problem, result.repeatable) == (True, "", True)
    assert (result.loaded_blocks, result.filler_tokens) == (2, 20)


@pytest.mark.parametrize(
    ("disturbed", "problem"),
    [
        (life(loaded_blocks=0), "nothing has been shown"),
        (life(recomputed_tokens=5), "5 tokens were computed again"),
        (life(output([1.0, -2.0, 3.0], [4.0, 5.0, 6.0], ids=(1, 3))), "tokens differ"),
        (life(output([1.0, -2.0, 3.1], [4.0, 5.0, 6.0])), "beyond rtol"),
        (life(output([1.0, -2.0, 3.0000002], [4.0, 5.0, 6.0])), "bitwise"),
        (life(Output((1, 2), ())), "no logits differ|logits differ"),
    ],
)
def test_a_prompt_fails(disturbed, problem):
    result = verify.judge(0, life(), life(), disturbed)
    assert not result.passed
    assert any(part in result.problem for part in problem.split("|"))


def test_a_server_that_never_repeats_itself_is_judged_by_the_tolerance():
    other = life(output([1.0, -2.0, 3.0000002], [4.0, 5.0, 6.0]))
    result = verify.judge(0, life(), other, other)
    assert result.passed
    assert not result.repeatable
    assert not result.after.bitwise_equal


def test_no_logits_at_all_is_no_proof():
    empty = life(Output((1, 2), ()))
    assert "no logits" in verify.judge(0, empty, empty, empty).problem


def test_the_table_and_the_file_say_the_same():
    good = verify.judge(0, life(), life(), life())
    bad = verify.judge(1, life(), life(), life(loaded_blocks=0))
    result = verify.VerifyResult(
        server="s:1",
        model="tiny",
        dtype="float32",
        rtol=verify.RTOL,
        atol=verify.ATOL,
        prompts=[good, bad],
        passed=False,
    )
    out = io.StringIO()
    verify.show(result, Console(file=out, width=160))
    assert "pass" in out.getvalue()
    assert "FAIL no block was copied back" in out.getvalue()
    data = msgspec.json.decode(verify.to_json(result))
    assert data["passed"] is False
    assert [prompt["passed"] for prompt in data["prompts"]] == [True, False]
