"""Errors that the user of a command can act on. All other exceptions are bugs, and keep their traceback."""

from __future__ import annotations

import errno
import os
import re


class CommandError(Exception):
    """A failure of the command, in one line: what was given, what was expected, what to do. Exit status 1."""

    status = 1


class UsageError(CommandError):
    """Arguments, a configuration or a schema that are wrong. Exit status 2."""

    status = 2


# What the operating system may lack: its error numbers, what is wrong, what to do.
_LACKING = (
    (
        (errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
        "the disk is full",
        "make room, or choose a place on another disk",
    ),
    ((errno.EROFS,), "the file system is read-only", "choose a place on a disk that can be written"),
    (
        (errno.EMFILE, errno.ENFILE),
        "too many files are open",
        "raise the limit, for example with `ulimit -n 65536`, and run the command again",
    ),
)


def resource_error(error: Exception, place: object) -> CommandError | None:
    """Returns the error of a full disk, a read-only file system or too many open files; None for any other error.

    Libraries raise exceptions of their own for them, with the text of the operating system in theirs.

    Args:
        error: what a command failed with.
        place: what was written or read, for the message; None if that is not known.
    """
    text = str(error)
    for numbers, problem, advice in _LACKING:
        if getattr(error, "errno", None) in numbers or any(os.strerror(number) in text for number in numbers):
            where = "" if place is None else f"{place}: "
            return CommandError(f"{where}{problem} ({text.splitlines()[0]}); {advice}")
    return None


def op_message(error: Exception) -> str:
    """Returns the line that a TensorFlow op failed with, without the graph's stack that tf.errors.OpError adds."""
    text = str(getattr(error, "message", error))
    # In a cluster, the name of the task comes first.
    text = re.sub(r"^From /job:\S+:\n", "", text, flags=re.MULTILINE)
    inside = re.search(r"^Node: .*\n(.+)", text, re.MULTILINE)
    return inside.group(1) if inside else text.strip().splitlines()[0]
