"""Packed files: named, typed, checksummed arrays in one memory-mapped file. See common/packed_file.h for the layout."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy.typing as npt

from dpsr_common import _native
from dpsr_common._native import FormatError, PackedFileWriter, checksum

__all__ = ["FormatError", "PackedFile", "PackedFileWriter", "checksum"]


class PackedFile(Mapping[str, "npt.NDArray[Any]"]):
    """A memory-mapped packed file, as a mapping from the names of its sections to read-only arrays [n].

    Nothing is copied, and an array keeps the file mapped. `kind` is the kind that the file must have ("items"); an
    empty string accepts any. `verify` computes the checksums of the whole file. Raises FileNotFoundError, and
    FormatError for a file that is corrupt, truncated, or of another version or kind.
    """

    def __init__(self, path: str | os.PathLike[str], kind: str = "", verify: bool = True) -> None:
        self._file = _native.PackedFile(path, kind, verify)
        self._names = self._file.names()

    @property
    def path(self) -> str:
        """The path that the file was opened with."""
        return self._file.path

    @property
    def kind(self) -> str:
        """The kind of the file, for example "vocabulary" or "items"."""
        return self._file.kind

    @property
    def fingerprint(self) -> int:
        """64 bits that identify the content."""
        return self._file.fingerprint

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        """Returns a section as an array. Raises KeyError if the file lacks the section."""
        section = self._file.get(name)
        if section is None:
            raise KeyError(f"{self.path}: has no section {name!r} (it has: {', '.join(self._names)})")
        return section

    def __contains__(self, name: object) -> bool:
        """Returns whether the file has a section."""
        return name in self._names

    def verify(self, name: str) -> None:
        """Computes the checksum of a section, if the file has it. Raises FormatError if it is wrong."""
        self._file.verify(name)

    def __iter__(self) -> Iterator[str]:
        """Iterates over the names of the sections in the order of the file."""
        return iter(self._names)

    def __len__(self) -> int:
        """Returns the number of sections."""
        return len(self._names)
