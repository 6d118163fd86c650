"""Files that appear whole or not at all, links to files that never change, and locks on directories."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from dpsr_common.errors import CommandError


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path` to write a file to, which then takes the place of `path`.

    Readers see the old file or the new one, never half of one. If the block fails, the temporary file is removed and
    `path` stays as it was. Several processes, also of several machines, may write the same path at the same time.
    """
    # Chosen by chance: in containers, processes of several machines often have the same number.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a file in UTF-8, so that it is never half written. Raises OSError."""
    with replaced(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def locked(directory: Path, otherwise: str) -> Iterator[None]:
    """Holds a lock on a directory, which leaves no file. The lock of a process that was killed is gone.

    On file systems that cannot lock directories, such as NFS, nothing is locked.

    Raises:
        CommandError: another process holds the lock; `otherwise` is the message.
        OSError: the directory does not exist.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CommandError(otherwise) from None
        yield
    finally:
        os.close(descriptor)


def link_or_copy(source: Path, path: Path) -> None:
    """Makes a hard link at `path` to a file that never changes. Copies the file where links are not possible."""
    try:
        os.link(source, path)
    except OSError:
        shutil.copyfile(source, path)
