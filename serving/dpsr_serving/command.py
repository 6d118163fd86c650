"""What the commands of this package share: flags, one-line errors, exit statuses (0 ok, 1 failed, 2 bad usage)."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from absl import flags


class CommandError(Exception):
    """A failure that the user can understand and act on: printed as one line, exit status 1."""

    status = 1


class UsageError(CommandError):
    """The command line or a configuration file is wrong: exit status 2."""

    status = 2


def run(
    argv: Sequence[str],
    flag_values: flags.FlagValues,
    usage: str,
    body: Callable[[list[str]], int | None],
    known_only: bool = False,
) -> int:
    """Parses `argv` into `flag_values`, runs `body` with the other arguments, and turns its errors into an exit status.

    Args:
        argv: `argv[0]` is the command's name as the user typed it, for example "dpsr query".
        usage: what `--help` prints above the flags.
        body: returns an exit status (None means 0) or raises CommandError.
        known_only: unknown flags are not an error, but arguments of `body`, in their order.
    """
    name = argv[0]
    try:
        arguments = flag_values(list(argv), known_only=known_only)[1:]
    except flags.Error as error:
        return _fail(name, UsageError(f"{error}; see `{name} --help`"))
    if flag_values["help"].value:
        print(_help(usage, flag_values))
        return 0
    try:
        return body(arguments) or 0
    except CommandError as error:
        return _fail(name, error)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader (`| head`) has what it wanted. Python must not fail once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def new_flags() -> flags.FlagValues:
    """Flags of one command only: the global `flags.FLAGS` would mix those of all modules that happen to be loaded."""
    values = flags.FlagValues()
    flags.DEFINE_boolean("help", False, "Prints this text.", flag_values=values)
    return values


def join_address(host: str, port: int) -> str:
    """The address as gRPC takes it, with an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _fail(name: str, error: CommandError) -> int:
    print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return error.status


def _help(usage: str, flag_values: flags.FlagValues) -> str:
    lines = [usage.strip(), "", "Flags:"]
    for name in sorted(flag_values):
        flag = flag_values[name]
        default = "" if flag.default in (None, False, "", []) else f" (default {flag.default})"
        lines.append(f"  --{'[no]' if flag.boolean else ''}{name}: {flag.help}{default}")
    return "\n".join(lines)
