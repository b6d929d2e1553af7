from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from services.common.errors import ExhaustedError
from services.scheduler import __main__ as program
from tests.support.scheduler_system import CONFIG, IO_WAIT, refused


async def explained(system, session_id) -> int:
    argv = ["explain", session_id, "--address", system.address]
    return await asyncio.to_thread(program.main, argv)


async def test_an_operator_asks_why_a_session_is_where_it_is(system, worker, capsys):
    await system.open("a")
    opened = system.scheduler.coordinator.store.get("a")
    # Before the worker's word has come, the policy says that nobody holds the session.
    await system.until(lambda _: opened.known)
    await system.signal(IO_WAIT, 1, tool_name="search")
    assert await explained(system, "a") == 0
    out = capsys.readouterr().out
    assert "a, IO_WAIT for search, on worker-0" in out
    assert "semantic: nothing to evict" in out
    assert "s of delay  <- costs least" in out


async def test_an_unknown_session_is_one_line_and_exit_code_1(system, capsys):
    assert await explained(system, "nobody") == 1
    assert capsys.readouterr().err == "djinn-scheduler explain: no session 'nobody'\n"


async def test_the_workers_are_told_how_to_serve(systems):
    modes = {}
    for policy in ("semantic", "reactive-recompute"):
        system = await systems.start(replace(CONFIG, policy=policy))
        worker = await systems.worker(system)
        mode = worker.welcome.mode
        modes[policy] = (mode.write_through, mode.offload, mode.share_prefixes)
    assert modes == {"semantic": (True, True, True), "reactive-recompute": (False, False, True)}


@pytest.mark.parametrize("quota", [1, 2])
async def test_a_tenant_over_its_quota_is_told_its_position(systems, quota):
    system = await systems.start(replace(CONFIG, tenant_quotas={"acme": quota}))
    await systems.worker(system)
    for n in range(quota):
        await system.open(f"s{n}", tenant_id="acme")
    for position, name in enumerate(("x", "y", "x"), 1):
        error = await refused(system.open(name, tenant_id="acme"), ExhaustedError)
        assert error.metadata["position"] == ("2" if position == 2 else "1")
        assert error.retry_after_s is not None
        assert error.retry_after_s > 0
    await system.open("other", tenant_id="else")
