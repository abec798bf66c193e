"""Errors that reach a user.

A message names the thing, the cause and the next step, in one line. The command line prints
it without a traceback and exits with ``exit_code``; the server turns it into an API error.
"""

from __future__ import annotations


class SartorError(Exception):
    """Something failed that the user can understand and act on."""

    exit_code = 1


class UsageError(SartorError):
    """The call itself is wrong: an unknown name, a value out of range, a missing argument."""

    exit_code = 2


class FormatError(SartorError):
    """A file is damaged, truncated or not of the format that it claims to be."""


class UnsupportedError(SartorError):
    """The file is sound, but asks for something that is not implemented."""


class CapacityError(SartorError):
    """The request or model does not fit: memory, context length, queue."""
