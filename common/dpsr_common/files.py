"""Files that appear whole or not at all, and links to files that never change."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


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


def link_or_copy(source: Path, path: Path) -> None:
    """Makes a hard link at `path` to a file that never changes. Copies the file where links are not possible."""
    try:
        os.link(source, path)
    except OSError:
        shutil.copyfile(source, path)
