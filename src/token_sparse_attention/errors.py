"""Errors that a command reports in one line, without a traceback."""

from __future__ import annotations


class UsageError(ValueError):
    """Something that was given cannot be used; the message says what and why."""


class JobFailedError(Exception):
    """The input could be used, but the job failed; the message says why."""
