"""The engine on real streams: what agents see, whatever is moved beneath them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from services.worker.messages import (
    Abort,
    Close,
    Drop,
    Evict,
    EvictMode,
    Finished,
    FinishReason,
    Open,
    Prefetch,
    Restore,
    SetHint,
    Shutdown,
    StopAt,
)
from tests.support.engine_harness import BLOCK, POISON, EngineHarness, continuation


@pytest.fixture
def harness() -> Iterator[EngineHarness]:
    harness = EngineHarness()
    yield harness
    harness.close()


PROMPT = list(range(10, 20))


def test_a_generation_reads_back_what_it_wrote(harness: EngineHarness) -> None:
    assert harness.generate("a", PROMPT, 6) == continuation(PROMPT, 6)
    finished = harness.generation("r1").finished
    assert finished is not None
    assert finished.reason is FinishReason.LENGTH
    assert finished.prefilled_tokens == len(PROMPT)
    assert finished.context_length == len(PROMPT) + 6


def test_a_batch_is_as_if_each_ran_alone(harness: EngineHarness) -> None:
    prompts = {name: [ord(name), *range(index, index + 7)] for index, name in enumerate("abcde")}
    requests = {name: harness.submit(name, prompt) for name, prompt in prompts.items()}
    harness.run()
    for name, prompt in prompts.items():
        assert harness.generation(requests[name]).tokens == continuation(prompt, 4)
    assert max(len(plan.slices) for plan in harness.runner.plans) > 1


def test_an_evicted_and_restored_session_prefills_only_its_new_tokens(
    harness: EngineHarness,
) -> None:
    first = harness.generate("a", PROMPT, 6)
    assert harness.carry_out("a", Evict(EvictMode.SCRUB)).error is None
    assert harness.session("a").kv.held is False
    restored = harness.carry_out("a", Restore())
    assert restored.moved_blocks == 4
    log = PROMPT + first + [1, 2, 3]
    assert harness.generate("a", [1, 2, 3]) == continuation(log, 4)
    finished = harness.generation("r2").finished
    assert finished is not None
    # Its last token of before has no KV yet, as in every engine.
    assert finished.prefilled_tokens == 3 + 1
    assert harness.engine.report().counters.recomputed_tokens == 0


def test_a_generate_restores_what_nobody_restored(harness: EngineHarness) -> None:
    first = harness.generate("a", PROMPT, 2)
    harness.carry_out("a", Evict(EvictMode.SCRUB))
    assert harness.generate("a", [5]) == continuation([*PROMPT, *first, 5], 4)
    started = harness.generation("r2").started
    assert started is not None
    assert started.kv.loaded_blocks == 3
    assert started.kv.held_blocks == 0
    assert harness.engine.report().counters.restores == 1


def test_a_lazily_evicted_session_is_found_resident(harness: EngineHarness) -> None:
    first = harness.generate("a", PROMPT, 2)
    harness.run()
    evicted = harness.carry_out("a", Evict())
    assert evicted.moved_blocks == 1  # the partial tail: the rest was written through
    result = harness.carry_out("a", Restore())
    assert (result.moved_blocks, result.resident_blocks) == (0, 3)
    assert harness.generate("a", [5]) == continuation([*PROMPT, *first, 5], 4)
    assert harness.engine.report().counters.loads == 0


def test_restoring_a_resident_session_succeeds_at_once(harness: EngineHarness) -> None:
    harness.generate("a", PROMPT)
    result = harness.carry_out("a", Restore())
    assert result.error is None
    assert result.moved_blocks == 0


def test_a_running_session_is_not_evicted_or_dropped(harness: EngineHarness) -> None:
    request = harness.submit("a", PROMPT)
    for action in (Evict(), Drop()):
        done = harness.carry_out("a", action)
        assert done.error is not None
        assert done.error.reason == "SESSION_BUSY"
    harness.run()
    assert harness.generation(request).tokens == continuation(PROMPT, 4)


def test_a_dropped_session_is_prefilled_again(harness: EngineHarness) -> None:
    first = harness.generate("a", PROMPT, 6)
    harness.carry_out("a", Drop())
    assert harness.session("a").kv.blocks == []
    # The blocks are cached by their content until somebody needs the room: fill it.
    harness.generate("filler", range(100, 155), 4)
    harness.carry_out("filler", Close())
    harness.generate("other", range(200, 255), 4)
    assert harness.generate("a", [1]) == continuation([*PROMPT, *first, 1], 4)


def test_sessions_share_the_blocks_of_a_common_prompt(harness: EngineHarness) -> None:
    system = list(range(3 * BLOCK))
    harness.generate("a", [*system, 1])
    request = harness.submit("b", [*system, 2])
    harness.run()
    started = harness.generation(request).started
    assert started is not None
    assert started.cached_tokens == len(system)
    assert started.kv.prefix_hit_tokens == len(system)
    assert harness.session("a").kv.blocks[:3] == harness.session("b").kv.blocks[:3]
    assert harness.generation(request).tokens == continuation([*system, 2], 4)


def test_two_that_prefill_the_same_prompt_at_once_end_with_one_copy(
    harness: EngineHarness,
) -> None:
    prompt = list(range(2 * BLOCK))
    requests = [harness.submit(name, [*prompt, 1]) for name in "ab"]
    harness.run()
    assert harness.session("a").kv.blocks[:2] == harness.session("b").kv.blocks[:2]
    for request in requests:
        assert harness.generation(request).tokens == continuation([*prompt, 1], 4)


def test_blocks_of_other_tenants_are_not_shared(harness: EngineHarness) -> None:
    prompt = list(range(2 * BLOCK + 1))
    harness.engine.create("a", "tenant-a", 0, b"")
    harness.engine.create("b", "tenant-b", 0, b"")
    harness.generate("a", prompt)
    harness.generate("b", prompt)
    assert harness.engine.report().counters.prefix_hit_tokens == 0


def test_twice_the_capacity_of_both_pools_loses_nothing_but_time() -> None:
    harness = EngineHarness(device_blocks=8, host_blocks=8, low_watermark=0.1)
    logs = {f"s{index}": [index, *range(9)] for index in range(10)}  # 3 to 5 blocks each
    for round_ in range(3):
        requests = {}
        for name, log in logs.items():
            append = log if round_ == 0 else [round_]
            log[:] = log if round_ == 0 else [*log, round_]
            requests[name] = harness.submit(name, append, max_tokens=2)
        harness.run()
        for name, log in logs.items():
            found = harness.generation(requests[name])
            assert found.rejected is None
            assert found.tokens == continuation(log, 2)
            log += found.tokens
    assert harness.engine.report().counters.recomputed_tokens > 0
    harness.close()


def test_a_full_device_evicts_the_idle_session_that_wakes_last(harness: EngineHarness) -> None:
    for index, name in enumerate("abc"):
        harness.generate(name, [index, *PROMPT], 1)  # 3 blocks each, of 16
    for name, wake_ns in (("a", 10), ("b", 30), ("c", 20)):
        harness.carry_out(name, SetHint(expected_wake_ns=wake_ns))
    harness.generate("big", range(500, 533), 1)  # 9 blocks
    assert [harness.session(name).kv.held for name in "abc"] == [True, False, True]


def test_a_prefetch_takes_nothing_that_somebody_holds() -> None:
    harness = EngineHarness(device_blocks=8)
    harness.generate("a", PROMPT)
    harness.carry_out("a", Evict(EvictMode.RELEASE))
    harness.generate("b", range(100, 122), 2)
    refused = harness.carry_out("a", Prefetch())
    assert refused.error is not None
    assert refused.error.code == "RESOURCE_EXHAUSTED"
    assert harness.session("b").kv.held
    harness.close()


def test_a_prefetched_session_needs_no_load_when_it_wakes(harness: EngineHarness) -> None:
    first = harness.generate("a", PROMPT, 2)
    harness.carry_out("a", Evict(EvictMode.RELEASE))
    assert harness.carry_out("a", Prefetch()).moved_blocks == 3
    assert harness.carry_out("a", Restore()).moved_blocks == 0
    assert harness.generate("a", [5]) == continuation([*PROMPT, *first, 5], 4)
    assert harness.engine.report().counters.prefetches == 1


def test_long_prompts_do_not_stop_decodes(harness: EngineHarness) -> None:
    decoding = harness.submit("a", [1], max_tokens=12)
    harness.run(until=lambda: bool(harness.generation(decoding).tokens))
    harness.submit("b", range(100, 140), max_tokens=1)
    harness.run()
    mixed = [p for p in harness.runner.plans if len(p.slices) == 2]
    assert mixed, "the prompt was not prefilled in chunks beside the decodes"
    assert all(len(p.slices[0].token_ids) == 1 for p in mixed)
    assert all(sum(len(s.token_ids) for s in p.slices) <= 16 for p in harness.runner.plans)


def test_a_wake_goes_ahead_of_new_agents() -> None:
    harness = EngineHarness(max_running=1)
    harness.generate("a", PROMPT, 1)
    blocker = harness.submit("x", [7], max_tokens=3)
    harness.turn()
    newcomer = harness.submit("b", [8])
    wake = harness.submit("a", [9])
    harness.run()
    assert [m.request_id for m in harness.heard if isinstance(m, Finished)][1:] == [
        blocker,
        wake,
        newcomer,
    ]
    harness.close()


def test_cancelling_in_the_middle_of_a_step_disturbs_nobody(harness: EngineHarness) -> None:
    cancelled = harness.submit("a", PROMPT, max_tokens=20)
    other = harness.submit("b", [3, 2, 1], max_tokens=6)
    harness.run(until=lambda: bool(harness.generation(cancelled).tokens))
    harness.engine.handle(Abort(cancelled))
    harness.run()
    rejected = harness.generation(cancelled).rejected
    assert rejected is not None
    assert rejected.error.code == "CANCELLED"
    assert harness.generation(other).tokens == continuation([3, 2, 1], 6)
    log = harness.session("a").tokens.copy()
    assert log[: len(PROMPT)] == PROMPT
    assert harness.generate("a", [4]) == continuation([*log, 4], 4)


def test_a_worker_that_stops_fails_what_runs_so_that_it_is_tried_elsewhere(
    harness: EngineHarness,
) -> None:
    request = harness.submit("a", PROMPT, max_tokens=20)
    harness.turn()
    harness.engine.handle(Shutdown())
    harness.run()
    rejected = harness.generation(request).rejected
    assert rejected is not None
    assert (rejected.error.code, rejected.error.reason) == ("UNAVAILABLE", "DRAINING")
    assert harness.engine.stopping


def test_a_stop_string_cuts_the_context(harness: EngineHarness) -> None:
    request = harness.submit("a", PROMPT, max_tokens=30)
    harness.run(until=lambda: len(harness.generation(request).tokens or []) >= 3)
    harness.engine.handle(StopAt(request, "a", len(PROMPT) + 2))
    harness.run()
    finished = harness.generation(request).finished
    assert finished is not None
    assert (finished.reason, finished.context_length) == (FinishReason.STOP, len(PROMPT) + 2)
    log = PROMPT + continuation(PROMPT, 2)
    assert harness.session("a").tokens == log
    assert harness.generate("a", [4]) == continuation([*log, 4], 4)


def test_a_stop_string_that_comes_too_late_cuts_the_context_all_the_same(
    harness: EngineHarness,
) -> None:
    harness.generate("a", PROMPT, 4)
    harness.engine.handle(StopAt("r1", "a", len(PROMPT) + 2))
    log = PROMPT + continuation(PROMPT, 2)
    assert harness.session("a").tokens == log
    assert harness.generate("a", [4]) == continuation([*log, 4], 4)


def test_a_stop_token_ends_the_generation_and_stays_in_the_context(
    harness: EngineHarness,
) -> None:
    expected = continuation(PROMPT, 5)
    request = harness.submit("a", PROMPT, max_tokens=30, stop=[expected[2]])
    harness.run()
    found = harness.generation(request)
    assert found.tokens == expected[: expected.index(expected[2]) + 1]
    assert found.finished is not None
    assert found.finished.reason is FinishReason.STOP


def test_a_full_context_keeps_the_common_prefix(harness: EngineHarness) -> None:
    harness.generate("a", PROMPT, 4)
    other = [*PROMPT[:9], 77, 78]
    request = harness.submit("a", [1], full_context=other)
    harness.run()
    found = harness.generation(request)
    assert found.tokens == continuation([*other, 1], 4)
    assert found.started is not None
    assert found.started.cached_tokens == 2 * BLOCK
    assert harness.session("a").tokens == [*other, 1, *found.tokens]


def test_the_very_same_context_again_computes_its_last_block_only(harness: EngineHarness) -> None:
    harness.generate("a", PROMPT, 1)
    request = harness.submit("a", full_context=PROMPT)
    harness.run()
    found = harness.generation(request)
    assert found.tokens == continuation(PROMPT, 4)
    assert found.finished is not None
    assert 1 <= found.finished.prefilled_tokens <= BLOCK


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"append": []}, "INVALID_REQUEST"),
        ({"append": [998]}, "INVALID_REQUEST"),
        ({"append": [-1]}, "INVALID_REQUEST"),
        ({"append": [1] * 65}, "CONTEXT_TOO_LONG"),
        ({"append": [1] * 60, "max_tokens": 5}, "CONTEXT_TOO_LONG"),
        ({"append": [1], "expected": 3}, "CONTEXT_MISMATCH"),
        ({"append": [1], "create": False}, "SESSION_UNKNOWN"),
    ],
)
def test_bad_requests_are_refused_and_disturb_nobody(
    harness: EngineHarness, fields: dict[str, object], reason: str
) -> None:
    other = harness.submit("other", PROMPT)
    bad = harness.submit("a", **fields)  # type: ignore[arg-type]
    harness.run()
    rejected = harness.generation(bad).rejected
    assert rejected is not None
    assert rejected.error.reason == reason
    assert harness.generation(other).tokens == continuation(PROMPT, 4)


def test_a_session_runs_one_request_at_a_time(harness: EngineHarness) -> None:
    first = harness.submit("a", PROMPT)
    second = harness.submit("a", [1])
    harness.run()
    rejected = harness.generation(second).rejected
    assert rejected is not None
    assert rejected.error.reason == "SESSION_BUSY"
    assert harness.generation(first).tokens == continuation(PROMPT, 4)


def test_a_stale_command_does_nothing(harness: EngineHarness) -> None:
    harness.generate("a", PROMPT)
    stale = harness.command("a", Evict(), expected_generation=1)
    late = harness.command("a", Evict(), deadline_ns=1)
    unknown = harness.command("nobody", Evict())
    harness.run()
    reasons = []
    for command in (stale, late, unknown):
        done = harness.done(command)
        assert done is not None
        assert done.error is not None
        reasons.append(done.error.reason)
    assert reasons == ["STALE_GENERATION", "COMMAND_TIMEOUT", "SESSION_UNKNOWN"]
    assert harness.session("a").kv.held


def test_a_command_says_when_it_was_taken_on(harness: EngineHarness) -> None:
    harness.generate("a", PROMPT)
    command = harness.command("a", Evict())
    harness.run()
    done = harness.done(command)
    assert done is not None
    assert 0 < done.taken_ns <= done.done_ns


def test_a_late_generate_does_not_revive_a_closed_session(harness: EngineHarness) -> None:
    harness.generate("a", PROMPT)
    running = harness.submit("a", [1], max_tokens=20)
    harness.turn()
    harness.carry_out("a", Close())
    late = harness.submit("a", PROMPT)
    harness.run()
    for request in (running, late):
        rejected = harness.generation(request).rejected
        assert rejected is not None
        assert rejected.error.reason == "SESSION_CLOSED"
    harness.carry_out("a", Open())
    assert harness.generate("a", PROMPT) == continuation(PROMPT, 4)


def test_logits_that_are_not_numbers_fail_one_request_and_are_not_shared(
    harness: EngineHarness,
) -> None:
    poisoned = [*range(2 * BLOCK), POISON, *range(BLOCK)]
    bad = harness.submit("a", poisoned)
    other = harness.submit("b", PROMPT)
    harness.run()
    for _ in range(2):
        rejected = harness.generation(bad).rejected
        assert rejected is not None
        assert rejected.error.code == "INTERNAL"
        bad = harness.submit("c", poisoned)
        harness.run()
    assert harness.generation(other).tokens == continuation(PROMPT, 4)
    assert harness.engine.report().counters.prefix_hit_tokens == 0


def test_a_fork_s_blocks_are_no_resident_hits(harness: EngineHarness) -> None:
    first = harness.generate("a", PROMPT, 6)
    request = harness.submit("fork", [1], full_context=[*PROMPT, *first])
    harness.run()
    started = harness.generation(request).started
    assert started is not None
    assert (started.kv.resident_blocks, started.kv.prefix_hit_tokens) == (0, 12)
    assert harness.engine.report().counters.resident_hit_blocks == 0


def test_closing_frees_everything(harness: EngineHarness) -> None:
    harness.submit("a", PROMPT, max_tokens=30)
    harness.turn()
    assert harness.carry_out("a", Close()).error is None
    assert harness.carry_out("a", Close()).error is None
    harness.run()
    report = harness.engine.report()
    assert report.device.used == report.host.used == 0
    assert report.device.in_flight == report.host.in_flight == 0


def test_without_a_host_pool_eviction_ends_in_recomputation() -> None:
    harness = EngineHarness(device_blocks=8, host_blocks=0)
    first = harness.generate("a", PROMPT, 2)
    assert harness.carry_out("a", Evict()).error is None
    harness.generate("b", range(100, 125), 2)
    assert harness.generate("a", [5]) == continuation([*PROMPT, *first, 5], 4)
    assert harness.engine.report().counters.drops == 2  # b had to go for a in turn
    harness.close()
