"""Errors that the person at the command line can act on; everything else is a bug and keeps its traceback."""

from __future__ import annotations


class CommandError(Exception):
    """One line that says what was given, what was expected, what to do. The command ends with status 1."""

    status = 1


class UsageError(CommandError):
    """Wrong arguments, or a wrong configuration file. The command ends with status 2."""

    status = 2
