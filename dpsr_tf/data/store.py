"""A store: one directory with the three files of DPSR section 5.1.2 and what belongs to them.

    manifest.json        format version, counts, fingerprints of the files, the schema
    vocabulary.dpsr      tokens and the tokenizer's config (dpsr_tokenizer.Vocabulary)
    users.dpsr           user features
    items.dpsr           item ids and token ids
    interactions.dpsr    distinct queries, positive pairs, supervised negatives
    titles.dpsr          item titles for people; training never reads it

The layout of each file is documented in dpsr_tf/ops/training_store.h and docs/data_format.md.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from dpsr_tf.errors import CommandError
from dpsr_tokenizer import FormatError, PackedFile, Vocabulary

FORMAT = "dpsr-store"
FORMAT_VERSION = 1
FILES = ("vocabulary.dpsr", "users.dpsr", "items.dpsr", "interactions.dpsr", "titles.dpsr")


@dataclasses.dataclass(frozen=True)
class Counts:
    """Rows of each table."""

    users: int
    items: int
    queries: int
    positives: int
    negatives: int


class Store:
    """A store that has been opened and whose files have been checked against its manifest."""

    def __init__(self, path: str | Path):
        """Raises CommandError if there is no whole store of this version at `path`."""
        self.path = Path(path)
        self.manifest = read_manifest(self.path / "manifest.json", FORMAT, FORMAT_VERSION, "dpsr ingest")
        try:
            self.counts = Counts(**self.manifest["counts"])
            fingerprints = {name: self.manifest["fingerprints"][name] for name in FILES}
        except (KeyError, TypeError) as error:
            raise CommandError(
                f"{path}/manifest.json: counts or fingerprints are missing or malformed ({error}); ingest the log again"
            ) from None
        for name in FILES:
            # Header and table only; the data are checked when they are read.
            found = f"{self._open(self.path / name, Path(name).stem, verify=False).fingerprint:016x}"
            if found != fingerprints[name]:
                raise CommandError(
                    f"{self.path / name}: is not the file this store was made with (fingerprint {found}, the manifest "
                    f"says {fingerprints[name]}); ingest the log again"
                )
        try:
            self.vocabulary = Vocabulary(str(self.vocabulary_path))
        except (FormatError, FileNotFoundError) as error:
            raise CommandError(f"{error}; ingest the log again") from None

    @property
    def vocabulary_path(self) -> Path:
        """The vocabulary file."""
        return self.path / "vocabulary.dpsr"

    @property
    def users_path(self) -> Path:
        """The user feature file."""
        return self.path / "users.dpsr"

    @property
    def items_path(self) -> Path:
        """The item feature file."""
        return self.path / "items.dpsr"

    @property
    def interactions_path(self) -> Path:
        """The interaction file."""
        return self.path / "interactions.dpsr"

    def _open(self, path: Path, kind: str, verify: bool = True) -> PackedFile:
        try:
            return PackedFile(str(path), kind, verify)
        except (FormatError, FileNotFoundError) as error:
            raise CommandError(f"{error}; ingest the log again") from None

    def items(self) -> PackedFile:
        """Sections `id` int64 [items], `tokens.splits` int64 [items + 1], `tokens.values` int32 [tokens]."""
        return self._open(self.items_path, "items")

    def interactions(self) -> PackedFile:
        """Sections `query.*`, `positive.*`, `negative.*`; see dpsr_tf/ops/training_store.h."""
        return self._open(self.interactions_path, "interactions")

    def titles(self) -> list[str]:
        """Title of each item, in the order of the item file."""
        return unpack_strings(self._open(self.path / "titles.dpsr", "titles"), "title")


def pack_strings(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Row splits int64 [n + 1] and UTF-8 bytes uint8 [total] of a list of texts."""
    encoded = [text.encode() for text in texts]
    splits = np.zeros(len(encoded) + 1, np.int64)
    np.cumsum([len(text) for text in encoded], out=splits[1:])
    return splits, np.frombuffer(b"".join(encoded), np.uint8)


def unpack_strings(file: PackedFile, name: str) -> list[str]:
    """The inverse of pack_strings, from sections `<name>.splits` and `<name>.bytes`."""
    splits, data = file[f"{name}.splits"], file[f"{name}.bytes"].tobytes()
    return [data[begin:end].decode() for begin, end in itertools.pairwise(splits)]


def read_manifest(path: Path, format_name: str, version: int, made_by: str) -> dict[str, Any]:
    """The JSON object in a manifest file. Raises CommandError if there is none of this format and version."""
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        what = format_name.removeprefix("dpsr-")
        raise CommandError(f"{path.parent}: holds no {what} (no {path.name}); make one with `{made_by}`") from None
    except (OSError, ValueError) as error:
        raise CommandError(f"{path}: cannot be read: {error}; run `{made_by}` again") from None
    if not isinstance(manifest, dict):
        raise CommandError(f"{path}: holds a {type(manifest).__name__}, expected an object; run `{made_by}` again")
    got = (manifest.get("format"), manifest.get("version"))
    if got != (format_name, version):
        raise CommandError(f"{path.parent}: is {got[0]} version {got[1]}, expected {format_name} version {version}")
    return manifest


@contextmanager
def new_directory(path: Path, overwrite: bool = False, what: str = "", mark: str = "") -> Iterator[Path]:
    """A temporary directory beside `path` that takes its name when the block ends well, and vanishes when it does not.

    Args:
        path: the directory to make.
        overwrite: replaces a directory that is there, if it is one of its kind.
        what: the kind, for the message: "store".
        mark: the file that tells a directory of that kind.

    Raises:
        CommandError: `path` is there and may not be replaced, or cannot be made.
    """
    if path.exists():
        if not overwrite:
            replace = ", or give --overwrite to replace it" if mark else ""
            raise CommandError(f"{path}: exists already; choose another --out{replace}")
        check_replaceable(path, what, mark)
    path = path.resolve()
    parents = [parent for parent in path.parents if not parent.exists()]
    temporary = None
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        except OSError as error:
            raise CommandError(f"{path}: cannot be made: {error.strerror}") from None
        yield temporary
        os.chmod(temporary, 0o755)  # mkdtemp makes it private
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
            os.rename(path, old / "old")
            os.rename(temporary, path)
            shutil.rmtree(old)
        else:
            os.rename(temporary, path)
    except BaseException:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        for parent in parents:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        raise


def check_replaceable(path: Path, what: str, mark: str) -> None:
    """Raises CommandError unless `path` is a directory with the file `mark`: --overwrite is for our own work only."""
    if not (path / mark).is_file():
        raise CommandError(
            f"{path}: is there and holds no {what} (no {mark}), so --overwrite leaves it alone; "
            f"remove it yourself, or choose another --out"
        )
