from __future__ import annotations

import datetime as dt

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

import djinn_client as djinn
from djinn.v1 import (
    admin_service_pb2,
    control_service_pb2,
    inference_service_pb2,
    types_pb2,
)
from djinn_client import _convert
from djinn_client._fake_faults import FaultError


@given(st.floats(1e-9, 1e9))
def test_durations_keep_nanoseconds(seconds: float) -> None:
    duration = _convert.duration_to_proto(seconds)
    assert 0 <= duration.nanos < 1_000_000_000
    assert _convert.seconds_of(duration) == pytest.approx(seconds, abs=1e-9, rel=1e-12)


def test_phases_are_the_protocols() -> None:
    for phase in djinn.Phase:
        number = _convert.phase_to_proto(phase)
        assert types_pb2.AgentPhase.Name(number) == f"AGENT_PHASE_{phase.value}"
        assert _convert.phase_from_proto(number) is phase
    assert len(djinn.Phase) == len(types_pb2.AgentPhase.items()) - 1


def test_evict_modes_are_the_protocols() -> None:
    for mode in djinn.EvictMode:
        number = _convert.evict_mode_to_proto(mode.value)
        assert control_service_pb2.EvictMode.Name(number) == f"EVICT_MODE_{mode.name}"
    assert len(djinn.EvictMode) == len(control_service_pb2.EvictMode.items()) - 1


def test_counters_are_the_protocols() -> None:
    names = [field.name for field in types_pb2.WorkerCounters.DESCRIPTOR.fields]
    assert list(djinn.Counters.__dataclass_fields__) == names
    message = admin_service_pb2.GetStatsResponse()
    for number, name in enumerate(names, start=1):
        setattr(message.counters, name, number)
    stats = _convert.stats_from_proto(message)
    assert [getattr(stats.counters, name) for name in names] == list(range(1, len(names) + 1))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (djinn.KvResidency, types_pb2.KvResidency),
        (djinn.PoolInfo, types_pb2.PoolReport),
        (djinn.ModelInfo, types_pb2.ModelInfo),
        (djinn.Usage, inference_service_pb2.Usage),
    ],
)
def test_fields_are_the_protocols(ours: type, theirs: type) -> None:
    names = {field.name for field in theirs.DESCRIPTOR.fields}  # type: ignore[attr-defined]
    assert set(ours.__dataclass_fields__) == names  # type: ignore[attr-defined]


def test_a_session() -> None:
    opened = Timestamp(seconds=1_700_000_000, nanos=500_000_000)
    session = _convert.session_from_proto(
        types_pb2.Session(
            session_id="s",
            name="n",
            tenant_id="t",
            priority=-3,
            phase=types_pb2.AGENT_PHASE_IO_WAIT,
            phase_sequence=4,
            open_time=opened,
            tool_name="search",
            worker_id="w",
            worker_endpoint="h:1",
            context_length=9,
            generation=2,
            kv=types_pb2.KvResidency(total_blocks=2, host_blocks=1),
        )
    )
    assert session.phase is djinn.Phase.IO_WAIT
    assert session.open_time == dt.datetime(2023, 11, 14, 22, 13, 20, 500_000, tzinfo=dt.UTC)
    assert session.expected_wake_time is None
    assert session.expire_time is None
    assert (session.tenant, session.priority, session.context_length) == ("t", -3, 9)
    assert session.kv == djinn.KvResidency(total_blocks=2, host_blocks=1)


def test_a_piece() -> None:
    piece = _convert.piece_from_proto(
        inference_service_pb2.GenerateDelta(
            token_ids=[3],
            text="x",
            logprobs=[
                inference_service_pb2.PositionLogprobs(
                    chosen=inference_service_pb2.TokenLogprob(token_id=3, logprob=-0.5),
                    top=[inference_service_pb2.TokenLogprob(token_id=4, logprob=-0.25)],
                )
            ],
            logits=[b"abcd"],
        )
    )
    chosen, top = djinn.TokenLogprob(3, -0.5), djinn.TokenLogprob(4, -0.25)
    assert piece == djinn.Piece("x", (3,), (djinn.PositionLogprobs(chosen, (top,)),), (b"abcd",))


def test_kv_sources() -> None:
    kv = _convert.kv_source_from_proto(
        inference_service_pb2.KvSource(
            loaded_blocks=2,
            loaded_bytes=64,
            load_duration=_convert.duration_to_proto(0.25),
        )
    )
    assert kv == djinn.KvSource(loaded_blocks=2, loaded_bytes=64, load_s=0.25)


def test_a_finish_reason_newer_than_the_client() -> None:
    newer = inference_service_pb2.FINISH_REASON_UNSPECIFIED
    assert _convert.finish_reason_from_proto(newer) is djinn.FinishReason.STOP


def test_a_command_that_failed_raises() -> None:
    result = control_service_pb2.CommandResult(moved_bytes=5, moved_blocks=1)
    assert _convert.outcome_from_proto(result).moved_bytes == 5
    result.status.CopyFrom(FaultError("STALE_GENERATION", "moved on").status())
    with pytest.raises(djinn.StaleGenerationError, match="moved on"):
        _convert.outcome_from_proto(result)
