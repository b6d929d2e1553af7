from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import aiohttp
import pytest
from prometheus_client import CollectorRegistry, Counter

from services.common.errors import ConfigError
from services.common.http_metrics import MetricsServer


class Rig:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.swaps = Counter("djinn_swaps", "Stores completed.", registry=self.registry)
        self.healthy = True
        self.vmu: dict[str, object] = {"status": "ok"}
        self.server = MetricsServer(
            self.registry, lambda: self.vmu, "127.0.0.1", 0, healthy=lambda: self.healthy
        )

    async def get(self, path: str, accept: str = "*/*") -> tuple[int, str, str]:
        async with (
            aiohttp.ClientSession() as session,
            session.get(
                f"http://{self.server.address}{path}", headers={"Accept": accept}
            ) as response,
        ):
            return response.status, response.headers["Content-Type"], await response.text()


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    rig = Rig()
    await rig.server.start()
    yield rig
    await rig.server.stop()


async def test_prometheus_text_is_what_a_scraper_without_wishes_gets(rig: Rig) -> None:
    rig.swaps.inc(3)

    status, content_type, text = await rig.get("/metrics")

    assert status == 200
    assert content_type.startswith("text/plain; version=0.0.4")
    assert "djinn_swaps_total 3.0\n" in text


async def test_open_metrics_is_served_to_who_asks_for_it(rig: Rig) -> None:
    status, content_type, text = await rig.get(
        "/metrics", accept="application/openmetrics-text; version=1.0.0"
    )

    assert status == 200
    assert content_type.startswith("application/openmetrics-text")
    assert text.endswith("# EOF\n")


async def test_the_json_is_made_anew_for_each_request(rig: Rig) -> None:
    first = await rig.get("/metrics/vmu")
    rig.vmu = {"status": "ok", "semantic_scheduler": {"swap_pool": {"swaps_performed": 5}}}
    second = await rig.get("/metrics/vmu")

    assert first == (200, "application/json; charset=utf-8", '{"status": "ok"}\n')
    assert '"swaps_performed": 5' in second[2]


async def test_health_follows_the_process(rig: Rig) -> None:
    assert (await rig.get("/healthz"))[0] == 200
    rig.healthy = False
    assert (await rig.get("/healthz"))[0] == 503


async def test_another_path_is_not_found(rig: Rig) -> None:
    assert (await rig.get("/nothing"))[0] == 404


async def test_a_busy_port_is_named_with_its_flag(rig: Rig) -> None:
    other = MetricsServer(
        CollectorRegistry(), dict, "127.0.0.1", rig.server.port, port_flag="--worker-metrics-port"
    )

    with pytest.raises(
        ConfigError, match=rf"^--worker-metrics-port {rig.server.port}: address already in use$"
    ):
        await other.start()
    await other.stop()


async def test_stop_without_start_does_nothing() -> None:
    await MetricsServer(CollectorRegistry(), dict, "127.0.0.1", 0).stop()


async def test_a_bug_in_one_answer_disturbs_no_other(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    rig.vmu = {"status": object()}

    assert (await rig.get("/metrics/vmu"))[0] == 500
    assert (await rig.get("/metrics"))[0] == 200
    assert "not JSON serializable" in caplog.text


async def test_what_is_no_http_is_a_line_for_who_looks_for_it(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.server.port)
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")
    assert b"400" in await reader.readline()
    writer.close()

    [record] = [r for r in caplog.records if "no HTTP" in r.getMessage()]
    assert (record.levelname, record.exc_info) == ("DEBUG", None)
    assert "\n" not in record.getMessage()
    assert not [r for r in caplog.records if r.levelname == "ERROR"]


async def test_a_bug_behind_a_request_is_logged_with_its_stack(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    rig.vmu["status"] = object()  # no JSON

    assert (await rig.get("/metrics/vmu"))[0] == 500

    [record] = [r for r in caplog.records if r.levelname == "ERROR"]
    assert record.exc_info
