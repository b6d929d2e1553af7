"""Systems as processes; the fake OpenAI-compatible server stands for each of them."""

from pathlib import Path

import pytest

from loadgen import launch
from loadgen.errors import LoadgenError, ServerError
from loadgen.systems import System
from loadgen.targets.openai import OpenAITarget
from loadgen.targets.options import OpenAIOptions
from tests.support import openai_server

FAKE = f"{{python}} {openai_server.__file__} {{port}}"


def system(command, **more):
    return System(command=command, target="openai", **more)


async def test_a_system_serves_while_it_is_needed(tmp_path):
    said: list[str] = []
    log = tmp_path / "log"
    async with launch.running("fake", system(FAKE), log, said.append) as server:
        target = await OpenAITarget.connect(server, OpenAIOptions())
        await target.info()
        await target.aclose()
    assert said == [f"starting fake, its output is in {log}"]
    with pytest.raises(ServerError):
        await OpenAITarget.connect(server, OpenAIOptions())


async def test_what_it_says_and_is_given_goes_through(tmp_path):
    command = "{python} -c 'import os, sys; print(os.environ[\"WORD\"], {port}); sys.exit(3)'"
    with pytest.raises(ServerError) as caught:
        async with launch.running(
            "bad", system(command, env={"WORD": "no model"}), tmp_path / "log", print
        ):
            pass
    text = str(caught.value)
    assert "system bad: ended with exit code 3 before it could serve: no model" in text
    assert "\n" not in text


async def test_one_that_does_not_come_up_in_time_is_stopped(tmp_path):
    command = "{python} -c 'import signal; signal.pause() # {port}'"
    with pytest.raises(ServerError, match=r"system slow: not ready within 0\.1 s: [^ ]"):
        async with launch.running(
            "slow", system(command, ready_timeout_s=0.1), tmp_path / "log", print
        ):
            pass


async def test_a_program_that_is_not_there_is_named(tmp_path):
    with pytest.raises(LoadgenError, match="system x: nothing-of-this-name: no such program"):
        async with launch.running(
            "x", system("nothing-of-this-name {port}"), tmp_path / "log", print
        ):
            pass


async def test_what_will_never_work_is_not_tried_to_the_end(tmp_path):
    never = system(FAKE, openai=OpenAIOptions(model="other"))
    with pytest.raises(LoadgenError, match="--model other"):
        async with launch.running("fake", never, tmp_path / "log", lambda text: None):
            pass


@pytest.mark.parametrize(
    "there", [System(server="localhost:1"), System(target="openai", server="http://localhost:1")]
)
async def test_nobody_at_an_address_is_a_clear_error(there):
    with pytest.raises(ServerError, match=r"system gone: .*localhost:1") as caught:
        async with launch.running("gone", there, Path("unused"), print):
            pass
    assert "\n" not in str(caught.value)
