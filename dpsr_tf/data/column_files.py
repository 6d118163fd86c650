"""Columns that grow in temporary files until they are copied into a packed file.

A packed file takes one section after another, but the rows of a table give all its columns at once. So each column
waits in a file of its own, which keeps the memory of `dpsr ingest` bounded.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpsr_common.packed_file import PackedFileWriter

_COPIED_ROWS = 1 << 18
_numbers = itertools.count()


class ColumnFile:
    """A column of fixed-size values in a temporary file."""

    def __init__(self, folder: Path, dtype: Any):
        """Begins an empty column of this type, in a new file in `folder`."""
        self._dtype, self.rows = np.dtype(dtype), 0
        self._path = folder / f"column-{next(_numbers)}"
        self._file: IO[bytes] = open(self._path, "wb")  # noqa: SIM115

    def append(self, values: np.ndarray) -> None:
        """Adds values of the column's type at its end."""
        assert values.dtype == self._dtype, (values.dtype, self._dtype)
        self._file.write(np.ascontiguousarray(values).data)
        self.rows += len(values)

    def copy(
        self,
        file: PackedFileWriter,
        name: str,
        begin: int = 0,
        end: int | None = None,
        change: Callable[[np.ndarray], np.ndarray] | None = None,
        dtype: Any = None,
    ) -> None:
        """Writes rows as a section of a packed file.

        Args:
            file: the packed file.
            name: the section.
            begin: the first row.
            end: one past the last row; None is the end of the column.
            change: what to do with the values before they are written.
            dtype: the type of the section; None is that of the column.
        """
        self._file.flush()
        dtype = np.dtype(dtype or self._dtype)
        end = self.rows if end is None else end
        if begin == end:
            file.add(name, np.zeros(0, dtype))
        for row in range(begin, end, _COPIED_ROWS):
            count = min(_COPIED_ROWS, end - row)
            values = np.fromfile(self._path, self._dtype, count, offset=row * self._dtype.itemsize)
            file.append(name, (change(values) if change else values).astype(dtype, copy=False))


class RaggedColumnFile:
    """A column of lists: their values in a temporary file, their lengths in memory."""

    def __init__(self, folder: Path, dtype: Any):
        """Begins an empty column whose lists have values of this type."""
        self._values = ColumnFile(folder, dtype)
        self._lengths: list[np.ndarray] = []

    @property
    def rows(self) -> int:
        """The number of lists."""
        return sum(map(len, self._lengths))

    @functools.cached_property
    def _splits(self) -> np.ndarray:
        return row_splits(np.concatenate([np.zeros(0, np.int64), *self._lengths]))

    def append(self, values: np.ndarray, splits: np.ndarray) -> None:
        """Adds n lists: their values [total], and their row splits int64 [n + 1]."""
        self._values.append(values)
        self._lengths.append(np.diff(splits))

    def copy(
        self, file: PackedFileWriter, splits_name: str, values_name: str, begin: int = 0, end: int | None = None
    ) -> None:
        """Writes the lists `begin` to `end` as two sections of a packed file."""
        self._values.copy(file, values_name, *add_splits(file, splits_name, self._splits, begin, end))


class RaggedRows:
    """Lists of numbers that lie in several packed files, one after the other."""

    def __init__(self, files: Sequence[tuple[np.ndarray, np.ndarray]]):
        """`files` are row splits int64 [rows + 1] and values of one type."""
        self._files = files
        self._first = row_splits(np.array([len(splits) - 1 for splits, _ in files], np.int64))

    def take(
        self, rows: np.ndarray, most: int | None = None, skipped: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the first numbers of some lists, and their row splits.

        Args:
            rows: int [n]; -1 is an empty list.
            most: how many numbers of a list, by default all.
            skipped: int [n], a number that each list is taken without.
        """
        rows = np.asarray(rows, np.int64)
        begins, lengths = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
        file_of = np.searchsorted(self._first, rows, side="right") - 1
        for i, (splits, _) in enumerate(self._files):
            here = np.flatnonzero((file_of == i) & (rows >= 0))
            local = rows[here] - self._first[i]
            begins[here], lengths[here] = splits[local], splits[local + 1] - splits[local]
        if most is not None:
            lengths = np.minimum(lengths, most + (skipped is not None) if most else 0)
        taken = row_splits(lengths)
        owner = np.repeat(np.arange(len(rows)), lengths)
        places = begins[owner] + np.arange(taken[-1]) - taken[owner]
        values = np.zeros(taken[-1], self._files[0][1].dtype if self._files else np.int32)
        for i, (_, numbers) in enumerate(self._files):
            mine = np.flatnonzero(file_of[owner] == i)
            values[mine] = numbers[places[mine]]
        if skipped is None or most is None:
            return values, taken
        kept = values != skipped[owner]
        counts = np.bincount(owner[kept], minlength=len(rows))
        # Where nothing was skipped, the list may be one too long.
        rank = np.arange(int(counts.sum())) - np.repeat(row_splits(counts)[:-1], counts)
        return values[kept][rank < most], row_splits(np.minimum(counts, most))


def row_splits(lengths: np.ndarray) -> np.ndarray:
    """Returns where each row begins among the values of all rows, int64 [rows + 1], given the rows' lengths."""
    splits = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=splits[1:])
    return splits


def add_splits(
    file: PackedFileWriter, name: str, splits: np.ndarray, begin: int = 0, end: int | None = None
) -> tuple[int, int]:
    """Writes the splits of the rows `begin` to `end`, from 0 on. Returns where their values begin and end."""
    piece = splits[begin : len(splits) if end is None else end + 1]
    file.add(name, piece - piece[0])
    return int(piece[0]), int(piece[-1])


def string_bytes(texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Returns the UTF-8 bytes uint8 [total] and row splits int64 [n + 1] of n texts; null counts as empty text."""
    texts = pc.fill_null(texts.cast(pa.large_string()), "")
    _, offsets, data = texts.buffers()
    splits = np.frombuffer(offsets, np.int64, len(texts) + 1, texts.offset * 8) if len(texts) else np.zeros(1, np.int64)
    values = np.frombuffer(data, np.uint8) if data is not None else np.zeros(0, np.uint8)
    return values[splits[0] : splits[-1]], splits - splits[0]
