"""What the engine process runs: the one place that leads from the front to the engine.

The front starts it by name in a fresh interpreter, so that only that one imports torch.
"""

from __future__ import annotations

import logging
import signal
import time

from services.common.logs import setup_logging
from services.worker.config import EngineConfig

_log = logging.getLogger(__name__)


def main(config: EngineConfig, address: str, log_level: str = "INFO") -> None:
    """Runs the engine until the front sends `Shutdown` or ends.

    Args:
        config: What to load and how.
        address: ZeroMQ address that the front listens on.
        log_level: As in `TelemetryConfig`.
    """
    setup_logging(log_level)
    # A Ctrl-C or a service manager's stop reaches every process of the group: the front drains and
    # then ends this process by a message.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    began_s = time.monotonic()
    from services.worker.engine.process import run_engine

    _log.info("imports took %.1f s", time.monotonic() - began_s)
    run_engine(config, address)
