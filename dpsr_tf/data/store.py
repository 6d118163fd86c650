"""A store: one directory with the three files of DPSR section 5.1.2 and what belongs to them.

    manifest.json        format version, counts, the vocabulary's fingerprint, the schema
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


@dataclasses.dataclass(frozen=True)
class Counts:
    """Rows of each table."""

    users: int
    items: int
    queries: int
    positives: int
    negatives: int


class Store:
    """A store that has been opened and whose manifest has been checked."""

    def __init__(self, path: str | Path):
        """Raises CommandError if there is no whole store of this version at `path`."""
        self.path = Path(path)
        try:
            self.manifest: dict[str, Any] = json.loads((self.path / "manifest.json").read_text())
        except FileNotFoundError:
            raise CommandError(f"{path}: holds no store (no manifest.json); make one with `dpsr ingest`") from None
        except (OSError, ValueError) as error:
            raise CommandError(f"{path}/manifest.json: cannot be read: {error}; ingest the log again") from None
        got = (self.manifest.get("format"), self.manifest.get("version"))
        if got != (FORMAT, FORMAT_VERSION):
            raise CommandError(f"{path}: is {got[0]} version {got[1]}, expected {FORMAT} version {FORMAT_VERSION}")
        self.counts = Counts(**self.manifest["counts"])
        try:
            self.vocabulary = Vocabulary(str(self.vocabulary_path))
        except (FormatError, FileNotFoundError) as error:
            raise CommandError(f"{error}; ingest the log again") from None
        if f"{self.vocabulary.fingerprint:016x}" != self.manifest["vocabulary_fingerprint"]:
            raise CommandError(
                f"{self.vocabulary_path}: fingerprint {self.vocabulary.fingerprint:016x}, but the store was made with "
                f"{self.manifest['vocabulary_fingerprint']}; ingest the log again"
            )

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

    def _open(self, path: Path, kind: str) -> PackedFile:
        try:
            return PackedFile(str(path), kind)
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


@contextmanager
def new_directory(path: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary directory beside `path` that takes its name when the block ends well, and vanishes when it does not.

    Raises CommandError if `path` is there already and `overwrite` is not set, or cannot be made.
    """
    if path.exists() and not overwrite:
        raise CommandError(f"{path}: exists already; choose another --out, or give --overwrite to replace it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise CommandError(f"{path}: cannot be made: {error.strerror}") from None
    try:
        yield temporary
        os.chmod(temporary, 0o755)  # mkdtemp makes it private
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
            os.rename(path, old / "old")
            os.rename(temporary, path)
            shutil.rmtree(old)
        else:
            os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
