"""Log lines: one per record, with level and logger name, on stderr."""

from __future__ import annotations

import logging
import sys

from services.common.errors import ConfigError

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


class _StderrHandler(logging.Handler):
    """Writes to whatever stderr is at the moment."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
        except Exception:  # noqa: BLE001 - as all of logging's handlers: a log line ends nothing
            self.handleError(record)


def setup_logging(level: str) -> None:
    """Sends log records of this level and above to stderr.

    Calling it again replaces what it did before; handlers of others stay.

    Args:
        level: One of `LEVELS`, in any case.

    Raises:
        ConfigError: There is no such level.
    """
    name = level.upper()
    if name not in LEVELS:
        raise ConfigError(f"--log-level {level}: must be one of {', '.join(LEVELS)}")
    root = logging.getLogger()
    for handler in root.handlers[:]:
        if isinstance(handler, _StderrHandler):
            root.removeHandler(handler)
    ours = _StderrHandler()
    ours.setFormatter(
        logging.Formatter(
            "%(asctime)s.%(msecs)03d %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S"
        )
    )
    root.addHandler(ours)
    root.setLevel(name)
    # Each request to /metrics and each poll of the event loop is of no interest to an operator.
    for noisy in ("aiohttp.access", "asyncio"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, logging.getLevelName(name)))
