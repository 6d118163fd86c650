"""Errors that the user of a command can act on. All other exceptions are bugs, and keep their traceback."""

from __future__ import annotations

import re


class CommandError(Exception):
    """A failure of the command, in one line: what was given, what was expected, what to do. Exit status 1."""

    status = 1


class UsageError(CommandError):
    """Arguments, a configuration or a schema that are wrong. Exit status 2."""

    status = 2


def op_message(error: Exception) -> str:
    """Returns the line that a TensorFlow op failed with, without the graph's stack that tf.errors.OpError adds."""
    text = str(getattr(error, "message", error))
    # In a cluster, the name of the task comes first.
    text = re.sub(r"^From /job:\S+:\n", "", text, flags=re.MULTILINE)
    inside = re.search(r"^Node: .*\n(.+)", text, re.MULTILINE)
    return inside.group(1) if inside else text.strip().splitlines()[0]
