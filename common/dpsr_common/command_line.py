"""The console script `dpsr`: finds the module of a command, parses its flags, runs it, and reports its errors.

A command is an entry point of the group "dpsr.commands" (pyproject.toml). Its value is a module with

    a docstring that begins "`dpsr NAME`: SUMMARY."       `dpsr --help` prints the summary
    USAGE: str                                            `--help` prints it above the flags
    define_flags(values: absl.flags.FlagValues) -> None
    run(values, arguments: list[str]) -> int | None       returns the exit status; None is 0

More attributes are optional:

    REQUIRED_FLAGS: names of flags without which the command does not start
    TAKES_ARGUMENTS = True: the command has arguments besides flags; without it they are an error
    PASS_UNKNOWN_FLAGS = True: unknown flags are for another program, and arrive in `arguments`
    REMOTE_INPUTS, REMOTE_PATHS: names of flags that may be in object stores (object_store.use_local_paths)

An exception with an integer attribute `status` (dpsr_common.errors) is one that the user can act on: it is printed as
one line and gives the exit status, 1 for a failure and 2 for bad usage. So are a full disk, a read-only file system and
too many open files. A module is imported only when its command runs, so `dpsr query` never imports TensorFlow.
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

from dpsr_common import __version__
from dpsr_common.errors import resource_error
from dpsr_common.object_store import use_local_paths

# The entry points of this group are the commands: name -> module.
GROUP = "dpsr.commands"

# The order of the commands in `dpsr --help` follows the work. Commands that are not named here come last.
_ORDER = (
    *("demo", "generate", "tokenize", "ingest"),
    *("train", "launch", "index", "rewrite", "export", "items"),
    *("copy", "stage", "serve", "proxy", "place", "query", "search"),
    *("evaluate", "report"),
)

# The extra of DPSR that installs a package. All other packages come with `train`.
_EXTRAS = (
    {"faiss": "faiss-cpu"}
    | dict.fromkeys(("markdown", "sklearn", "threadpoolctl"), "report")
    | dict.fromkeys(("aiohttp", "opensearchpy", "orjson", "tantivy"), "gateway")
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `dpsr COMMAND ...` and returns the exit status. `argv` does not include the program's name."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("help", "--help", "-h"):
        return _guarded(lambda: print(_overview(), flush=True)) or (0 if arguments else 2)
    if arguments == ["--version"]:
        return _guarded(lambda: print(f"dpsr {__version__}", flush=True))
    name, known = arguments[0], commands()
    if name not in known:
        return _fail("dpsr", f"no command '{name}', expected one of: {', '.join(known)}", 2)
    # Users should see our progress, not TensorFlow's start-up lines and Estimator's deprecation warnings. TensorFlow's
    # errors still arrive, as exceptions.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.getLogger("tensorflow").setLevel(logging.CRITICAL)
    try:
        return run_command(f"dpsr {name}", known[name].load(), arguments[1:])
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0].startswith("dpsr_"):
            raise
        extra = _EXTRAS.get(error.name or "", "train")
        return _fail(f"dpsr {name}", f"needs the package '{error.name}'; run: pip install 'dpsr[{extra}]'", 1)


def run_command(name: str, module: ModuleType, arguments: Sequence[str]) -> int:
    """Parses `arguments` with the flags of the command `module`, runs it, and returns the exit status."""
    # The global `flags.FLAGS` would also hold the flags of every other module that happens to be loaded.
    values = flags.FlagValues()
    flags.DEFINE_boolean("help", False, "print this text and exit", flag_values=values)
    module.define_flags(values)
    passes_unknown_flags = getattr(module, "PASS_UNKNOWN_FLAGS", False)
    takes_arguments = passes_unknown_flags or getattr(module, "TAKES_ARGUMENTS", False)
    try:
        rest = values([name, *arguments], known_only=passes_unknown_flags)[1:]
        if values["help"].value:
            return _guarded(lambda: print(_help(module.USAGE, values), flush=True))
        values.validate_all_flags()
        if rest and not takes_arguments:
            raise flags.Error(f"unexpected argument '{rest[0]}'")
        for required in getattr(module, "REQUIRED_FLAGS", ()):
            if values[required].value is None:
                raise flags.Error(f"--{required} is missing ({values[required].help})")
    except flags.Error as error:
        return _fail(name, f"{error}; see `{name} --help`", 2)

    def body() -> int | None:
        use_local_paths(module, values)
        result: int | None = module.run(values, list(rest))
        return result

    try:
        return _guarded(body)
    except Exception as error:
        status = getattr(error, "status", None)
        if isinstance(status, int):
            return _fail(name, str(error), status)
        # An error of writing to a file that is open already does not name the file.
        place = getattr(error, "filename", None) or (values["out"].value if "out" in values else None)
        lacking = resource_error(error, place)
        if lacking is None:
            raise
        return _fail(name, str(lacking), lacking.status)


def commands() -> dict[str, EntryPoint]:
    """Returns the entry point of each command by its name, in the order of `dpsr --help`."""
    installed = {entry.name: entry for entry in entry_points(group=GROUP)}
    names = [name for name in _ORDER if name in installed] + sorted(set(installed) - set(_ORDER))
    return {name: installed[name] for name in names}


def summary(entry: EntryPoint) -> str:
    """Returns the summary of a command from the first line of its module's docstring, "`dpsr NAME`: SUMMARY.".

    Reads the source; the module is not imported.
    """
    spec = importlib.util.find_spec(entry.module)
    if spec is None or spec.origin is None:
        return ""
    docstring = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0].partition(": ")[2].removesuffix(".")


def _guarded(body: Callable[[], int | None]) -> int:
    """Runs `body` and returns its exit status, also if the user interrupts it or nobody reads its output any more."""
    try:
        return body() or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader (`| head`) has what it wanted. Without this, Python would fail again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _fail(name: str, message: str, status: int) -> int:
    print(f"{name}: error: {' '.join(message.split())}", file=sys.stderr)
    return status


def _overview() -> str:
    lines = ["Usage: dpsr COMMAND [flags]", "", "Deep personalized and semantic retrieval for e-commerce search.", ""]
    lines += [f"  {name:<10} {summary(entry)}" for name, entry in commands().items()]
    lines += ["", "`dpsr COMMAND --help` lists a command's flags. `dpsr --version` prints the version."]
    return "\n".join(lines)


def _help(usage: str, values: flags.FlagValues) -> str:
    lines = [usage.strip(), "", "Flags:"]
    for name in sorted(values):
        flag = values[name]
        default = "" if flag.default in (None, False, "", []) else f" (default {flag.default})"
        lines.append(f"  --{'[no]' if flag.boolean else ''}{name}: {flag.help}{default}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
