"""Directories in object stores (s3://, gs://): complete copies, and a local cache of what must be mapped.

A directory in an object store is complete when it has the file `dpsr_complete.json`, which `upload` writes last. It
lists the other files with sizes and SHA-256:

    {"format": "dpsr-complete", "version": 1, "files": {"items.dpsr": {"bytes": 8192, "sha256": "..."}, ...}}

So a reader never takes half of a directory, and knows a file by its content: the cache holds each content once, also
if several directories or versions have it.

The cache is the folder $DPSR_CACHE, by default ~/.cache/dpsr, of at most $DPSR_CACHE_BYTES bytes, by default 100e9:

    files/SHA256      contents
    trees/KEY/...     directories, or parts of them, hard links to contents; KEY.lock is locked by the processes that
                      read it. The KEY.fill of a directory is locked by the process that downloads it or a part of it

Credentials, regions and endpoints come from the environment, as for every program of AWS (AWS_PROFILE,
AWS_ENDPOINT_URL, ...) or Google Cloud (GOOGLE_APPLICATION_CREDENTIALS).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from absl import flags

from dpsr_common.errors import CommandError, UsageError, resource_error
from dpsr_common.files import link_or_copy, replaced

SCHEMES = ("s3://", "gs://")
MARK = "dpsr_complete.json"
_BLOCK = 1 << 22
_DEFAULT_BYTES = "100e9"
_LEFT_S = 86_400.0  # without a change, after which an unfinished download is one of a process that was killed
# The directories of the cache that this process reads, and their shared locks, which last as long as the process.
_locks: dict[Path, int] = {}


def is_remote(path: str) -> bool:
    """Whether a path is in an object store."""
    return path.startswith(SCHEMES)


class RemoteFolder:
    """A directory in an object store. Methods raise CommandError if the store cannot be reached or refuses."""

    def __init__(self, url: str):
        """Names a directory, which need not exist, such as s3://bucket/store."""
        if not is_remote(url) or not url.partition("://")[2].strip("/") or "?" in url:
            raise UsageError(f"{url}: expected a directory such as s3://BUCKET/DIR or gs://BUCKET/DIR")
        self.url = url.rstrip("/")
        try:
            from pyarrow import fs
        except ImportError:
            raise CommandError(f"{url}: needs the package 'pyarrow'; run: pip install 'dpsr[object_stores]'") from None
        self._fs = fs
        with self._errors("opened"):
            self._files, self._path = fs.FileSystem.from_uri(self.url)

    def folders(self) -> list[str]:
        """Returns the names of the directories in this one; [] if it does not exist."""
        with self._errors("listed"):
            found = self._files.get_file_info(self._fs.FileSelector(self._path, allow_not_found=True))
        return [info.base_name for info in found if info.type == self._fs.FileType.Directory]

    def names(self) -> list[str]:
        """Returns the names of all files, relative to this directory; [] if it does not exist."""
        selector = self._fs.FileSelector(self._path, recursive=True, allow_not_found=True)
        with self._errors("listed"):
            found = self._files.get_file_info(selector)
        return [info.path[len(self._path) + 1 :] for info in found if info.type == self._fs.FileType.File]

    def files(self) -> dict[str, dict[str, Any]] | None:
        """Returns the files that the mark lists, name -> bytes, sha256; None if the directory is not complete.

        Raises:
            CommandError: the mark is damaged.
        """
        with self._errors("read"):
            info = self._files.get_file_info(f"{self._path}/{MARK}")
            if info.type != self._fs.FileType.File:
                return None
            with self._files.open_input_stream(f"{self._path}/{MARK}") as stream:
                data = stream.read()
        return _files_of(data, f"{self.url}/{MARK}")

    def download(self, name: str, expected: Mapping[str, Any], path: Path) -> None:
        """Writes a file to `path`. Raises CommandError if it is not the file that the mark lists."""
        with (
            self._errors("read", path.parent),
            self._files.open_input_stream(f"{self._path}/{name}") as stream,
            open(path, "wb") as out,
        ):
            found = _copy(stream, out)
        if found != dict(expected):
            raise CommandError(
                f"{self.url}/{name}: is not the file that {MARK} lists ({found['bytes']:,} bytes, expected "
                f"{expected['bytes']:,}); copy the directory again"
            )

    def write(self, name: str, source: Path | bytes) -> dict[str, Any]:
        """Writes a file of this machine, or bytes, to `name`. Returns what the mark says about it."""
        with (
            self._errors("written"),
            io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file,
            self._files.open_output_stream(f"{self._path}/{name}") as out,
        ):
            return _copy(file, out)

    def delete(self, name: str) -> None:
        """Removes a file."""
        with self._errors("removed"):
            self._files.delete_file(f"{self._path}/{name}")

    @contextlib.contextmanager
    def _errors(self, done: str, folder: Path | None = None) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            # This machine may be what refuses: `folder` is on its disk.
            lacking = resource_error(error, folder)
            if lacking is not None:
                raise lacking from None
            reason = " ".join(str(error).split())[:300]
            raise CommandError(
                f"{self.url}: cannot be {done}: {reason}; check the path, the credentials and the endpoint"
            ) from None


# Copies.


def upload(directory: Path, url: str, overwrite: bool = False) -> int:
    """Copies a directory into an object store, its mark last. Returns the number of bytes.

    Args:
        directory: a complete directory of this machine.
        url: where to.
        overwrite: whether to replace files that are there. Readers find no complete directory meanwhile.

    Raises:
        CommandError: there are files already, or one cannot be read or written.
    """
    folder, paths = RemoteFolder(url), _all_files(directory)
    if not paths:
        raise CommandError(f"{directory}: holds no files; give a directory of `dpsr ingest`, `dpsr index` and so on")
    unreadable = [path for path in paths.values() if not os.access(path, os.R_OK)]
    if unreadable:  # before the mark of the old directory is gone
        raise CommandError(f"{unreadable[0]}: cannot be read; correct its permissions")
    before = folder.names()
    if before and not overwrite:
        raise CommandError(f"{url}: holds files already; choose another directory, or give --overwrite")
    if MARK in before:
        folder.delete(MARK)
    files = {name: folder.write(name, path) for name, path in paths.items()}
    for name in set(before) - {MARK, *files}:
        folder.delete(name)
    folder.write(MARK, _mark(files))
    return sum(record["bytes"] for record in files.values())


def download(url: str, path: Path, known: Mapping[str, Path] | None = None) -> dict[str, dict[str, Any]]:
    """Copies a directory of an object store to a path of this machine, where it appears when it is complete.

    Args:
        url: a complete directory.
        path: does not exist.
        known: files of this machine by SHA-256, which are linked, or copied, in place of a download.

    Returns:
        The files, as RemoteFolder.files.

    Raises:
        CommandError: the directory is not complete, or changes meanwhile; or the path exists.
    """
    folder = RemoteFolder(url)
    files = _complete_files(folder)
    if path.exists():
        raise CommandError(f"{path}: exists already; choose another path")
    path.parent.mkdir(parents=True, exist_ok=True)
    # The server's directory scan takes numbers only, so it does not see this name.
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.unfinished-", dir=path.parent))
    try:
        for name, expected in files.items():
            target = _inside(temporary, name)
            source = (known or {}).get(expected["sha256"])
            if source is not None:
                link_or_copy(source, target)
            else:
                folder.download(name, expected, target)
        (temporary / MARK).write_bytes(_mark(files))
        os.chmod(temporary, 0o755)
        # A machine that loses its power must not find a complete directory without the contents of its files.
        for part in (*temporary.rglob("*"), temporary):
            _sync(part)
        os.rename(temporary, path)
        _sync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return files


def _sync(path: Path) -> None:
    """Returns when a file, or the names in a directory, are on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def local_mark(directory: Path) -> dict[str, dict[str, Any]] | None:
    """Returns the files of a directory that `download` has made; None for another directory."""
    try:
        return _files_of((directory / MARK).read_bytes(), str(directory / MARK))
    except OSError:
        return None


# The cache.


def cached(url: str, wanted: Callable[[str], bool] | None = None) -> Path:
    """Returns a local copy of a directory in an object store, which must not be changed.

    It stays there as long as this process runs. Two processes that ask for the same directory, or for parts of it,
    download each file once.

    Args:
        url: a complete directory.
        wanted: tells from its name whether a file is needed; None takes all. The other files are not there.

    Raises:
        CommandError: the directory is not complete or changes meanwhile, what is in use fills the cache, or there
            cannot be a cache.
    """
    folder = RemoteFolder(url)
    complete = _complete_files(folder)
    files = {name: record for name, record in complete.items() if wanted is None or wanted(name)}
    cache = Path(os.environ.get("DPSR_CACHE") or Path.home() / ".cache" / "dpsr")
    tree = cache / "trees" / _key(files)
    if tree in _locks:
        return tree
    try:
        (cache / "files").mkdir(parents=True, exist_ok=True)
        (cache / "trees").mkdir(exist_ok=True)
        lock = _lock_of(tree)
    except OSError as error:
        raise CommandError(f"{cache}: cannot be made: {error.strerror}; give another DPSR_CACHE") from None
    try:
        # Shared, so that others may read it at the same time. Nobody removes it meanwhile.
        fcntl.flock(lock, fcntl.LOCK_SH)
        if not tree.is_dir():
            with _exclusive(tree.with_name(f"{_key(complete)}.fill")):
                if not tree.is_dir():  # else another process was faster
                    _fill(cache, tree, folder, files)
        os.utime(tree)
    except BaseException:
        os.close(lock)
        raise
    _locks[tree] = lock
    return tree


def _key(files: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the name in the cache of a directory with these files."""
    return hashlib.sha256(_mark(files)).hexdigest()[:32]


def _fill(cache: Path, tree: Path, folder: RemoteFolder, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Downloads the files that the cache does not have, and makes the directory `tree` of all."""
    with _exclusive(cache / "lock"):
        _remove_leftovers(cache)
        _make_room(cache, sum(_missing(cache, files).values()))
    temporary = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=cache / "trees"))
    try:
        for name, expected in files.items():
            content = cache / "files" / expected["sha256"]
            target = _inside(temporary, name)
            # Another process may remove a content that no tree holds, so the link says whether it is there.
            while not _linked(content, target):
                with replaced(content) as path:
                    folder.download(name, expected, path)
                    _sync(path)  # nobody looks again whether a content is whole, not even after a loss of power
            os.utime(temporary)  # so that _remove_leftovers of other processes leaves it alone
        os.chmod(temporary, 0o755)
        os.rename(temporary, tree)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _linked(content: Path, target: Path) -> bool:
    try:
        os.link(content, target)
    except FileNotFoundError:
        return False
    return True


def _missing(cache: Path, files: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    return {
        record["sha256"]: record["bytes"]
        for record in files.values()
        if not (cache / "files" / record["sha256"]).exists()
    }


def _remove_leftovers(cache: Path) -> None:
    """Removes what processes that were killed began to download."""
    for left in (*(cache / "files").glob(".*.tmp"), *(cache / "trees").glob(".unfinished-*")):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime <= _LEFT_S:
                continue
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink()


def _make_room(cache: Path, wanted: int) -> None:
    """Removes the directories that were used longest ago, and contents that no directory has, until there is room."""
    text = os.environ.get("DPSR_CACHE_BYTES") or _DEFAULT_BYTES
    try:
        limit = float(text)
    except ValueError:
        raise UsageError(
            f"DPSR_CACHE_BYTES={text}: is not a number; give the bytes of the cache, such as 100e9"
        ) from None

    def sizes() -> int:
        return sum(_size(path) for path in (cache / "files").iterdir())

    if sizes() + wanted <= limit:
        return
    trees = [tree for tree in (cache / "trees").iterdir() if tree.is_dir() and not tree.name.startswith(".")]
    for tree in sorted(trees, key=lambda tree: tree.stat().st_mtime):
        lock = _lock_of(tree)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue  # a process reads it
        else:
            shutil.rmtree(tree)
        finally:
            os.close(lock)
        for content in (cache / "files").iterdir():
            with contextlib.suppress(FileNotFoundError):
                if content.stat().st_nlink == 1 and not content.name.startswith("."):
                    content.unlink()
        if sizes() + wanted <= limit:
            return
    if sizes() + wanted > limit:
        raise CommandError(
            f"{cache}: {wanted:,} bytes more do not fit into DPSR_CACHE_BYTES={text}, because running processes use "
            f"{sizes():,}; give more, or another DPSR_CACHE"
        )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0  # a download that ended meanwhile


def _lock_of(tree: Path) -> int:
    return os.open(tree.with_name(f"{tree.name}.lock"), os.O_RDWR | os.O_CREAT, 0o644)


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Holds the lock of a file. Cleaning the cache has one such file, and each directory has one for its download."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


# Flags of commands.


def use_local_paths(module: ModuleType, values: flags.FlagValues) -> None:
    """Replaces directories in object stores that a command reads by local copies.

    Args:
        module: a command. REMOTE_INPUTS names its flags with directories that it only reads, REMOTE_PATHS those that it
            treats itself.
        values: its flags, which are changed.

    Raises:
        UsageError: another flag has a path in an object store.
        CommandError: see `cached`.
    """
    for name in values:
        value = values[name].value
        remote = [text for text in (value if isinstance(value, list) else [value]) if _is_remote_text(text)]
        if not remote or name in getattr(module, "REMOTE_PATHS", ()):
            continue
        if name not in getattr(module, "REMOTE_INPUTS", ()):
            raise UsageError(
                f"--{name}={remote[0]}: must be a path of this machine; `dpsr copy` copies from and to object stores"
            )
        if "engine" in values and values["engine"].value == "spark":
            raise UsageError(f"--{name}={value}: with --engine=spark it must be a path that all machines see")
        values[name].value = str(cached(value))


def _is_remote_text(value: Any) -> bool:
    return isinstance(value, str) and is_remote(value)


# Marks.


def _complete_files(folder: RemoteFolder) -> dict[str, dict[str, Any]]:
    files = folder.files()
    if files is None:
        raise CommandError(
            f"{folder.url}: is not a complete directory (no {MARK}); write it with `dpsr copy`, or wait until that ends"
        )
    return files


def _mark(files: Mapping[str, Mapping[str, Any]]) -> bytes:
    content = {"format": "dpsr-complete", "version": 1, "files": dict(sorted(files.items()))}
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _files_of(data: bytes, where: str) -> dict[str, dict[str, Any]]:
    try:
        content = json.loads(data)
        if (content["format"], content["version"]) != ("dpsr-complete", 1):
            raise ValueError(f"it is of {content['format']} version {content['version']}")
        files: dict[str, dict[str, Any]] = {
            str(name): {"bytes": int(record["bytes"]), "sha256": str(record["sha256"])}
            for name, record in content["files"].items()
        }
        bad = [name for name, record in files.items() if not re.fullmatch("[0-9a-f]{64}", record["sha256"])]
        if bad:
            raise ValueError(f"{bad[0]} has no SHA-256")
        return files
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CommandError(f"{where}: cannot be read: {error}; copy the directory again") from None


def _copy(source: Any, target: Any) -> dict[str, Any]:
    """Copies a stream of bytes. Returns what the mark says about them."""
    digest, size = hashlib.sha256(), 0
    while block := source.read(_BLOCK):
        digest.update(block)
        size += len(block)
        target.write(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _all_files(directory: Path) -> dict[str, Path]:
    paths = {str(path.relative_to(directory)): path for path in sorted(directory.rglob("*")) if path.is_file()}
    return {name: path for name, path in paths.items() if name != MARK}


def _inside(directory: Path, name: str) -> Path:
    """Returns the path of a file in a directory, whose folder is made. Raises CommandError if it is outside."""
    path = directory / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise CommandError(f"{name}: is not a path inside the directory; the file {MARK} is damaged")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
