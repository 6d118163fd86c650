"""Errors that the person at the command line can act on; everything else is a bug and keeps its traceback."""

from __future__ import annotations

import re


class CommandError(Exception):
    """One line that says what was given, what was expected, what to do. The command ends with status 1."""

    status = 1


class UsageError(CommandError):
    """Wrong arguments, or a wrong configuration or schema file. The command ends with status 2."""

    status = 2


def op_message(error: Exception) -> str:
    """The line that a TensorFlow op failed with, without the graph's stack that tf.errors.OpError wraps around it."""
    text = str(getattr(error, "message", error))
    text = re.sub(r"^From /job:\S+:\n", "", text, flags=re.MULTILINE)  # in a cluster
    inside = re.search(r"^Node: .*\n(.+)", text, re.MULTILINE)
    return inside.group(1) if inside else text.strip().splitlines()[0]
