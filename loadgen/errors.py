"""Errors that a person is meant to read: one line each, exit code 2."""

from __future__ import annotations


class LoadgenError(Exception):
    """The command cannot be done as it was given; the message is one line."""


class WorkloadError(LoadgenError):
    """A workload file is malformed; the message names file, line, key, value and its type."""


class RunFileError(LoadgenError):
    """A run's folder or one of its files cannot be read."""


class ServerError(LoadgenError):
    """The server cannot be reached or cannot do what the command needs."""
