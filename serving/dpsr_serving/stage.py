"""`dpsr stage`: brings the versions of a servable from an object store to this machine, for `dpsr serve`."""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from absl import flags

from dpsr_common.errors import CommandError, UsageError
from dpsr_common.files import locked
from dpsr_common.object_store import RemoteFolder, download, is_remote, local_mark

USAGE = """
Usage: dpsr stage --from=s3://BUCKET/BASE --to=DIR [--keep=2] [--poll=30]

Copies the newest versions of a servable from an object store (s3://, gs://) to DIR, which `dpsr serve
--model_base_path=DIR` watches. Versions are directories named by numbers that `dpsr copy` wrote there; incomplete ones
wait until they are complete. Files that a version shares with a version in DIR are not copied again. Versions that this
command copied are removed when they are no longer among the newest --keep, or are gone from the object store.
"""

REQUIRED_FLAGS = ("from", "to")
REMOTE_PATHS = ("from",)


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of `dpsr stage`."""
    flags.DEFINE_string("from", None, "base path of the servable in an object store", flag_values=values)
    flags.DEFINE_string("to", None, "directory for the versions", flag_values=values)
    flags.DEFINE_integer("keep", 2, "number of versions to keep, the newest ones", 1, flag_values=values)
    flags.DEFINE_float(
        "poll", 0, "seconds between two looks at the object store; 0 looks once and ends", 0, flag_values=values
    )


def run(values: flags.FlagValues, arguments: list[str]) -> None:
    """Runs `dpsr stage`."""
    source, base = values["from"].value, Path(values["to"].value)
    if not is_remote(source):
        raise UsageError(f"--from={source}: expected a path such as s3://BUCKET/BASE or gs://BUCKET/BASE")
    while True:
        try:
            for line in stage(source, base, values.keep):
                print(line, flush=True)
        except CommandError as error:
            if not values.poll:
                raise
            # What is staged stays. The next look may succeed.
            print(f"dpsr stage: {error}", file=sys.stderr, flush=True)
        if not values.poll:
            return
        time.sleep(values.poll)


def stage(source: str, base: Path, keep: int) -> list[str]:
    """Brings the newest complete versions from an object store, and removes others that it brought before.

    A version that is damaged, or changes meanwhile, is left out in favour of an older one; standard error says why.

    Args:
        source: base path in the object store.
        base: base path on this machine.
        keep: number of versions.

    Returns:
        What was done, a line for each version.

    Raises:
        CommandError: there is no complete version, the object store cannot be read, or --to cannot be written.
    """
    try:
        base.mkdir(parents=True, exist_ok=True)
        with locked(base, f"{base}: another `dpsr stage` writes there; choose another --to"):
            return _stage(source, base, keep)
    except OSError as error:
        where = error.filename or base
        raise CommandError(f"{where}: cannot be written: {error.strerror}; check --to and its disk") from None


def _stage(source: str, base: Path, keep: int) -> list[str]:
    done: list[str] = []
    for left in base.iterdir():
        if re.fullmatch(r"\.\d+\.(unfinished-\w+|removed)", left.name):
            shutil.rmtree(left)  # of a killed run
    here = {int(path.name): path for path in base.iterdir() if _is_version(path.name)}
    complete: list[int] = []
    problems: dict[int, str] = {}
    for version in sorted(_versions(RemoteFolder(source).folders()), reverse=True):
        if len(complete) == keep:
            break
        path = base / str(version)
        try:
            if RemoteFolder(f"{source}/{version}").files() is None:
                continue
            if version not in here:
                files = download(f"{source}/{version}", path, _known(here.values()))
                done.append(f"{path}: staged, {sum(record['bytes'] for record in files.values()) / 1e6:.1f} MB")
        except CommandError as error:
            problems[version] = str(error)
            continue
        here[version] = path
        complete.append(version)
    if problems and not complete:
        raise CommandError("; ".join(problems.values()))
    for problem in problems.values():
        print(f"dpsr stage: {problem}", file=sys.stderr, flush=True)
    if not complete:
        raise CommandError(f"{source}: has no complete version; write one with `dpsr copy --to={source}/NUMBER`")
    for version, path in sorted(here.items()):
        if version not in complete and version not in problems and local_mark(path) is not None:
            _remove(path)
            done.append(f"{path}: removed")
    return done


def _known(versions: Iterable[Path]) -> dict[str, Path]:
    """Returns the files of versions that `stage` brought, by their SHA-256."""
    marks = [(path, local_mark(path) or {}) for path in versions]
    return {record["sha256"]: path / name for path, files in marks for name, record in files.items()}


def _remove(path: Path) -> None:
    # Under another name first: a server never finds half of a version.
    hidden = path.with_name(f".{path.name}.removed")
    path.rename(hidden)
    shutil.rmtree(hidden)


def _versions(names: Iterable[str]) -> list[int]:
    return [int(name) for name in names if _is_version(name)]


def _is_version(name: str) -> bool:
    return name.isascii() and name.isdigit() and name == str(int(name))
