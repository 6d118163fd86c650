"""The console script `dpsr`: finds a command's module, parses its flags, runs it, turns its errors into a status.

A command is an entry point of the group "dpsr.commands" (pyproject.toml), whose value is a module with

    a docstring that begins "`dpsr NAME`: SUMMARY."       what `dpsr --help` prints
    USAGE: str                                            what `--help` prints above the flags
    define_flags(values: absl.flags.FlagValues) -> None
    run(values, arguments: list[str]) -> int | None       the exit status; None is 0

and, where it needs them, `REQUIRED_FLAGS` (names), `TAKES_ARGUMENTS = True` (else one is an error), and
`PASS_UNKNOWN_FLAGS = True` (flags for another program, which arrive in `arguments`). An
exception with an integer attribute `status` is the user's to mend: it is printed as one line and gives the exit status
(1 failed, 2 bad usage). Modules are imported only when their command runs, so `dpsr query` never imports TensorFlow.
"""

from __future__ import annotations

import ast
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType

from absl import flags

# Entry points of this group are the commands: name -> module.
GROUP = "dpsr.commands"

# The order of `dpsr --help`: that of the work. Commands that are not named here come last.
_ORDER = (
    *("demo", "generate", "tokenize", "ingest"),
    *("train", "launch", "index", "export"),
    *("serve", "proxy", "place", "query"),
    *("evaluate", "report"),
)

# The extra that brings a package; all others are of `train`.
_EXTRAS = {"faiss": "faiss-cpu"} | dict.fromkeys(("markdown", "matplotlib", "sklearn", "threadpoolctl"), "report")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `dpsr COMMAND ...`; `argv` leaves the program's name out. Returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("help", "--help", "-h"):
        return _guarded(lambda: print(_overview(), flush=True)) or (0 if arguments else 2)
    name, found = arguments[0], commands()
    if name not in found:
        return _fail("dpsr", f"no command '{name}', expected one of: {', '.join(found)}", 2)
    # Users should see our progress, not TensorFlow's start-up lines and Estimator's deprecation warnings.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.getLogger("tensorflow").setLevel(logging.CRITICAL)  # errors arrive as exceptions
    try:
        return run_command(f"dpsr {name}", found[name].load(), arguments[1:])
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0].startswith("dpsr_"):
            raise
        extra = _EXTRAS.get(error.name or "", "train")
        return _fail(f"dpsr {name}", f"needs the package '{error.name}'; run: pip install 'dpsr[{extra}]'", 1)


def run_command(name: str, module: ModuleType, arguments: Sequence[str]) -> int:
    """Parses `arguments` with the flags of the command `module`, runs it, and returns the exit status."""
    # Flags of one command only: the global `flags.FLAGS` would mix those of all modules that happen to be loaded.
    values = flags.FlagValues()
    flags.DEFINE_boolean("help", False, "prints this text", flag_values=values)
    module.define_flags(values)
    try:
        rest = values([name, *arguments], known_only=getattr(module, "PASS_UNKNOWN_FLAGS", False))[1:]
        if values["help"].value:
            return _guarded(lambda: print(_help(module.USAGE, values), flush=True))
        values.validate_all_flags()
        takes_arguments = any(getattr(module, name, False) for name in ("TAKES_ARGUMENTS", "PASS_UNKNOWN_FLAGS"))
        if rest and not takes_arguments:
            raise flags.Error(f"unexpected argument '{rest[0]}'")
        for required in getattr(module, "REQUIRED_FLAGS", ()):
            if values[required].value is None:
                raise flags.Error(f"--{required} is missing ({values[required].help})")
    except flags.Error as error:
        return _fail(name, f"{error}; see `{name} --help`", 2)
    try:
        return _guarded(lambda: module.run(values, list(rest)))
    except Exception as error:
        status = getattr(error, "status", None)
        if not isinstance(status, int):
            raise
        return _fail(name, str(error), status)


def commands() -> dict[str, EntryPoint]:
    """Entry point of each command, in the order of `dpsr --help`."""
    found = {entry.name: entry for entry in entry_points(group=GROUP)}
    names = [name for name in _ORDER if name in found] + sorted(set(found) - set(_ORDER))
    return {name: found[name] for name in names}


def summary(entry: EntryPoint) -> str:
    """What a command does, out of the first line of its module's docstring. Nothing is imported for it.

    The line reads "`dpsr NAME`: SUMMARY."
    """
    spec = importlib.util.find_spec(entry.module)
    if spec is None or spec.origin is None:
        return ""
    docstring = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0].partition(": ")[2].removesuffix(".")


def _guarded(body: Callable[[], int | None]) -> int:
    """The exit status of `body`, also where the user or the reader of our output ends it."""
    try:
        return body() or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader (`| head`) has what it wanted. Python must not fail once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _fail(name: str, message: str, status: int) -> int:
    print(f"{name}: error: {' '.join(message.split())}", file=sys.stderr)
    return status


def _overview() -> str:
    lines = ["Usage: dpsr COMMAND [flags]", "", "Deep personalized and semantic retrieval for e-commerce search.", ""]
    lines += [f"  {name:<10} {summary(entry)}" for name, entry in commands().items()]
    return "\n".join([*lines, "", "`dpsr COMMAND --help` lists a command's flags."])


def _help(usage: str, values: flags.FlagValues) -> str:
    lines = [usage.strip(), "", "Flags:"]
    for name in sorted(values):
        flag = values[name]
        default = "" if flag.default in (None, False, "", []) else f" (default {flag.default})"
        lines.append(f"  --{'[no]' if flag.boolean else ''}{name}: {flag.help}{default}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
