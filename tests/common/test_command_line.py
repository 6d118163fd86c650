from __future__ import annotations

import errno
import importlib.metadata
import os
import subprocess
import sys
import types

import pytest
from absl import flags

from dpsr_common import __version__, command_line
from dpsr_common.errors import CommandError, UsageError


def python(*arguments):
    """Runs a Python process with these arguments."""
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("argument", ["help", "--help", "-h"])
def test_overview(dpsr, argument):
    out = dpsr(argument).succeeds().out
    assert out.startswith("Usage: dpsr COMMAND [flags]")
    for name, entry in command_line.commands().items():
        summary = command_line.summary(entry)
        assert summary and any(line.split(maxsplit=1) == [name, summary] for line in out.splitlines()), name


def test_version(dpsr):
    version = dpsr("--version").succeeds().out.split()
    assert version == ["dpsr", importlib.metadata.version("dpsr")] == ["dpsr", __version__]


def test_no_command_is_bad_usage_and_shows_the_overview(dpsr):
    outcome = dpsr()
    assert outcome.status == 2 and "Usage: dpsr COMMAND" in outcome.out


@pytest.mark.parametrize("name", ["trian", "Train", "", "--store=x"])
def test_unknown_command(dpsr, name):
    dpsr(name, "--out=x").fails(2, f"dpsr: error: no command '{name}', expected one of: demo, generate, ")


@pytest.mark.parametrize("name", list(command_line.commands()))
def test_every_command_has_help(dpsr, name):
    out = dpsr(name, "--help").succeeds().out
    assert out.startswith(f"Usage: dpsr {name}"), out[:80]
    assert "\nFlags:\n" in out
    described = [line for line in out.partition("\nFlags:\n")[2].splitlines() if line.startswith("  --")]
    assert described
    for line in described:
        flag, _, text = line.partition(": ")
        assert text.strip(), f"{name} {flag} has no help"
    assert len(out.splitlines()) <= 60 and max(map(len, out.splitlines())) <= 200


@pytest.mark.parametrize("name", list(command_line.commands()))
def test_help_wins_over_what_is_missing_or_wrong_elsewhere(dpsr, name):
    assert "Flags:" in dpsr(name, "--nohelp", "--help").succeeds().out


@pytest.mark.parametrize("name", ["demo", "generate", "ingest", "train", "index", "export", "query", "evaluate"])
def test_unknown_flag(dpsr, name):
    dpsr(name, "--nonsense=1").fails(2, f"dpsr {name}: error: ", "nonsense", f"see `dpsr {name} --help`")


def test_a_misspelt_flag_gets_a_suggestion(dpsr):
    dpsr("ingest", "--shema=x").fails(2, "Unknown command line flag 'shema'", "Did you mean", "schema")


@pytest.mark.parametrize("name", ["ingest", "train", "index", "export", "evaluate"])
def test_missing_required_flags(dpsr, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dpsr(name).fails(2, f"dpsr {name}: error: ", "--")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["ingest", "--max_reject_fraction=some"], "max_reject_fraction"),
        (["ingest", "--overwrite=perhaps"], "overwrite"),
        (["ingest", "--schema"], "schema"),
        (["ingest", "--flagfile=/none"], "/none"),
    ],
)
def test_flag_values_that_do_not_parse(dpsr, arguments, fragment):
    dpsr(*arguments).fails(2, fragment)


def test_flags_of_one_command_do_not_leak_into_another(dpsr):
    dpsr("ingest", "--out=o", "--schema=a", "--adapter=b").fails(2, "either --schema=FILE or --adapter=NAME")
    dpsr("train", "--schema=a").fails(2, "Unknown command line flag 'schema'")
    dpsr("ingest", "--adapter=b").fails(2, "--out is missing")


def command(run, **attributes):
    """Returns a command module with one flag."""

    def define_flags(values):
        flags.DEFINE_integer("number", 3, "any number", flag_values=values)

    module = types.ModuleType("command")
    vars(module).update({"USAGE": "Usage: dpsr x", "define_flags": define_flags, "run": run} | attributes)
    return module


def fail(error):
    def run(values, arguments):
        raise error

    return run


class _ErrorOfAnotherPackage(Exception):
    status = 1


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (CommandError("a.tsv: is empty"), 1, "dpsr x: error: a.tsv: is empty"),
        (UsageError("--k=0: expected 1 or more"), 2, "dpsr x: error: --k=0: expected 1 or more"),
        (_ErrorOfAnotherPackage("no answer"), 1, "dpsr x: error: no answer"),
        (CommandError("two\nlines   and\ttabs"), 1, "dpsr x: error: two lines and tabs"),
    ],
)
def test_errors_become_one_line_and_a_status(capfd, error, status, line):
    assert command_line.run_command("dpsr x", command(fail(error)), []) == status
    out, err = capfd.readouterr()
    assert (out, err) == ("", line + "\n")


class _ErrorOfALibrary(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "place", "problem", "advice"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/a"), "/data/a", "the disk is full", "make room"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "/data/out", "the disk is full", "make room"),
        (
            OSError(errno.EROFS, os.strerror(errno.EROFS), "/data/a"),
            "/data/a",
            "the file system is read-only",
            "choose a place on a disk that can be written",
        ),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE), "/data/a"), "/data/a", "too many files are open", "ulimit"),
        (_ErrorOfALibrary("IO Error: No space left on device\n(pid 7)"), "/data/out", "the disk is full", "make room"),
    ],
)
def test_missing_resources_become_one_line(capfd, error, place, problem, advice):
    def define_flags(values):
        flags.DEFINE_string("out", None, "any path", flag_values=values)

    module = command(fail(error), define_flags=define_flags)
    assert command_line.run_command("dpsr x", module, ["--out=/data/out"]) == 1
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith(f"dpsr x: error: {place}: {problem} (") and advice in err
    # Without a flag --out, a message that names no file begins with what is wrong.
    if place == "/data/out":
        assert command_line.run_command("dpsr x", command(fail(error)), []) == 1
        assert capfd.readouterr().err.startswith(f"dpsr x: error: {problem} (")


def test_other_errors_of_the_system_keep_their_traceback():
    with pytest.raises(ConnectionResetError):
        command_line.run_command("dpsr x", command(fail(ConnectionResetError(errno.ECONNRESET, "reset"))), [])


def test_bugs_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        command_line.run_command("dpsr x", command(fail(ZeroDivisionError())), [])
    error = RuntimeError("status is not a number")
    error.status = "bad"
    with pytest.raises(RuntimeError):
        command_line.run_command("dpsr x", command(fail(error)), [])


def test_interrupt():
    assert command_line.run_command("dpsr x", command(fail(KeyboardInterrupt())), []) == 130


def test_an_interrupt_while_an_input_is_downloaded(monkeypatch):
    def download(module, values):
        raise KeyboardInterrupt

    monkeypatch.setattr(command_line, "use_local_paths", download)
    assert command_line.run_command("dpsr x", command(fail(AssertionError("must not run"))), []) == 130


def test_status_and_arguments():
    seen = []

    def run(values, arguments):
        seen.append((values.number, arguments))
        return 7 if arguments else None

    assert command_line.run_command("dpsr x", command(run), ["--number=5"]) == 0
    assert command_line.run_command("dpsr x", command(run), ["a", "b"]) == 2
    assert command_line.run_command("dpsr x", command(run, TAKES_ARGUMENTS=True), ["a", "b"]) == 7
    assert command_line.run_command("dpsr x", command(run), ["--other=1"]) == 2, "not run at all"
    passing = command(run, PASS_UNKNOWN_FLAGS=True)
    assert command_line.run_command("dpsr x", passing, ["--other=1", "--number=4"]) == 7
    assert seen == [(5, []), (3, ["a", "b"]), (4, ["--other=1"])]


def test_query_imports_no_tensorflow():
    """`dpsr query` must start quickly, and also where TensorFlow is not installed."""
    code = (
        "import sys; from dpsr_common import command_line; status = command_line.main(['query', '--help']); "
        "heavy = {'tensorflow', 'pyarrow', 'faiss', 'bm25s', 'tensorflow_serving'} & set(sys.modules); "
        "print(sorted(heavy)); sys.exit(status)"
    )
    result = python("-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Usage: dpsr query") and result.stdout.splitlines()[-1] == "[]"
    result = python("-X", "importtime", "-m", "dpsr_common", "query", "--help")
    assert result.returncode == 0 and "Usage: dpsr query" in result.stdout
    assert "absl" in result.stderr and "tensorflow" not in result.stderr


@pytest.mark.parametrize("name", ["proxy", "serve"])
def test_serving_commands_import_no_tensorflow(name):
    script = f"import sys; from dpsr_common.command_line import main; main(['{name}', '--help'])"
    code = f"{script}; print('tensorflow' in sys.modules)"
    result = python("-c", code)
    assert result.returncode == 0 and result.stdout.splitlines()[-1] == "False", result.stderr


@pytest.mark.parametrize(
    ("name", "missing", "extra"),
    [("ingest", "pyarrow", "train"), ("evaluate", "bm25s", "train"), ("index", "faiss", "faiss-cpu")],
)
def test_a_missing_package_says_what_to_install(name, missing, extra):
    # An entry of None in sys.modules is how Python itself marks a module that cannot be imported.
    blocked = f"import sys; sys.modules['{missing}'] = None"
    code = f"{blocked}; from dpsr_common.command_line import main; sys.exit(main(['{name}']))"
    result = python("-c", code)
    assert result.returncode == 1
    assert f"needs the package '{missing}'; run: pip install 'dpsr[{extra}]'" in result.stderr, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_exit_status_of_the_process(tmp_path):
    result = python("-m", "dpsr_common", "nonsense")
    assert (result.returncode, result.stdout) == (2, "") and result.stderr.count("\n") == 1
    result = python("-m", "dpsr_common", "train", f"--store={tmp_path}", f"--out={tmp_path / 'm'}")
    assert result.returncode == 1
    assert (
        result.stderr
        == f"dpsr train: error: {tmp_path}: holds no store (no manifest.json); make one with `dpsr ingest`\n"
    )


def test_a_reader_that_stops_early():
    """`dpsr help | head -1` prints no traceback."""
    code = "from dpsr_common import command_line; import sys; sys.exit(command_line.main(['help']))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    process.wait()
