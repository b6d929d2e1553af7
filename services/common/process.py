"""What every Djinn process does alike: start, stop when told to, end with a meaningful code.

Exit codes: 0 well, 1 a bug or a lost part (a stack or a line is in the log), 2 the process was told
something it cannot do (one line says what), 130 interrupted twice.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable

from services.common.errors import ConfigError

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_CONFIG = 2
EXIT_INTERRUPTED = 130

# Set by a process that starts others: its process id, with which its children end.
SUPERVISOR_VARIABLE = "DJINN_SUPERVISOR_PID"

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

_logger = logging.getLogger(__name__)


def run(name: str, main: Callable[[asyncio.Event], Awaitable[int]]) -> int:
    """Runs a process's main coroutine to its end.

    SIGINT and SIGTERM set the event that `main` is given; `main` then drains and returns. An
    impatient SIGINT after it cancels `main`; another SIGTERM does nothing, since supervisors may
    send it to the process and to its group. Works as process 1 of a container.

    Args:
        name: The program's name, put before its last line.
        main: Called with the stop event in a running loop; returns the exit code.

    Returns:
        The exit code: `main`'s, or one of this module's.
    """
    try:
        end_with_supervisor()
        return asyncio.run(_until_stopped(main))
    except ConfigError as error:
        sys.stderr.write(f"{name}: {' '.join(str(error).split())}\n")
        return EXIT_CONFIG
    except (KeyboardInterrupt, asyncio.CancelledError):
        return EXIT_INTERRUPTED
    except Exception:
        _logger.exception("%s ends because of a bug", name)
        return EXIT_FAILURE


async def _until_stopped(main: Callable[[asyncio.Event], Awaitable[int]]) -> int:
    stop = asyncio.Event()
    task = asyncio.ensure_future(main(stop))
    loop = asyncio.get_running_loop()

    def on_signal(number: int) -> None:
        if stop.is_set() and number == signal.SIGINT:
            _logger.warning("SIGINT while stopping: ending at once")
            task.cancel()
        elif not stop.is_set():
            _logger.info("%s: stopping", signal.Signals(number).name)
            stop.set()

    signals = (signal.SIGINT, signal.SIGTERM)
    for number in signals:
        loop.add_signal_handler(number, on_signal, number)
    try:
        return await task
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


def end_with_supervisor() -> None:
    """Has this process sent SIGTERM when the process that started it ends, however it ends.

    Does nothing unless that process asked for it by `SUPERVISOR_VARIABLE`, or where there is no
    such thing (other systems than Linux).

    Raises:
        ConfigError: That process has ended already.
    """
    supervisor = os.environ.get(SUPERVISOR_VARIABLE)
    if supervisor is None:
        return
    # Its own children are not the supervisor's.
    del os.environ[SUPERVISOR_VARIABLE]
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(supervisor):
        raise ConfigError(f"the process {supervisor} that started this one has ended")


def adopt_orphans() -> None:
    """Makes this process the parent of its descendants' orphans, so that it can wait for them."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
