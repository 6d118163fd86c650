"""Raw tables from disk into Arrow: Parquet, CSV, TSV and JSON lines, plain or gzip, one file or many."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from dpsr_tf.errors import CommandError, UsageError

_SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl")


def find_files(patterns: Sequence[str], base: Path) -> list[Path]:
    """The files that `patterns` (files, directories, globs; relative to `base`) name, each pattern's in order of name.

    Raises UsageError if a pattern names none, or a file of a kind that cannot be read.
    """
    found: list[Path] = []
    for pattern in patterns:
        path = base / pattern
        if path.is_dir():
            matches = sorted(p for p in path.iterdir() if p.is_file() and _suffix(p) in _SUFFIXES)
        elif path.is_file():
            matches = [path]
        else:
            matches = [Path(p) for p in sorted(glob.glob(str(path))) if Path(p).is_file()]
        if not matches:
            raise UsageError(f"{path}: no such file; give --input, or correct `files` in the schema")
        found += matches
    for path in found:
        check_kind(path)
    return found


def check_kind(path: Path) -> None:
    """Raises UsageError if `path` does not end as a table's file does."""
    if _suffix(path) not in _SUFFIXES:
        raise UsageError(f"{path}: unknown kind of file, expected {', '.join(_SUFFIXES)} (with or without .gz)")


class Table:
    """Some columns of one file. Every method raises CommandError that names file and column, and what to mend."""

    def __init__(self, path: Path, texts: Sequence[str], others: Sequence[str], mend: str = "correct the schema"):
        """Reads a file.

        Args:
            path: the file; its ending says of what kind it is.
            texts: columns of text, whatever they look like: a query may be "100".
            others: columns of other values.
            mend: what to do about a column that is missing or of another type than expected.

        Raises:
            CommandError: the file is empty or unreadable, a column is missing or stands twice, text is not UTF-8.
        """
        self.path, self._mend = path, mend
        columns = list(dict.fromkeys([*texts, *others]))
        if path.stat().st_size == 0:
            raise CommandError(f"{path}: is empty, expected a table with columns {', '.join(columns)}")
        try:
            table = _read(path, texts)
            names = table.column_names
        except UnicodeDecodeError:
            raise CommandError(f"{path}: a column's name is not UTF-8; convert the file to UTF-8") from None
        except (pa.ArrowException, OSError) as error:
            raise CommandError(f"{path}: cannot be read as {_suffix(path)[1:]}: {error}") from None
        missing = [column for column in columns if column not in names]
        if missing:
            there = ", ".join(names)
            raise CommandError(f"{path}: has no column {', '.join(missing)}; its columns are {there}; {mend}")
        twice = [column for column in columns if names.count(column) > 1]
        if twice:
            raise CommandError(f"{path}: column {twice[0]} stands more than once; rename one of them")
        self._table = table.select(columns)
        for column in columns:
            try:
                self._table.column(column).validate(full=True)
            except pa.ArrowInvalid as error:
                raise self._not_text(column, error) from None

    def __len__(self) -> int:
        """Rows."""
        return len(self._table)

    def text(self, name: str) -> pa.ChunkedArray:
        """A column as large_string [rows]; null is the empty text."""
        try:
            return pc.fill_null(pc.cast(self._table.column(name), pa.large_string()), "")
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise self._not_text(name, error) from None

    def ids(self, name: str, minimum: int = -(2**63)) -> np.ndarray:
        """A column as int64 [rows], all `minimum` or more."""
        try:
            column = pc.cast(self._table.column(name), pa.int64())
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise self._error(name, f"is no whole number: {error}; expected int64 ids") from None
        if column.null_count:
            raise self._error(name, f"has {column.null_count:,} rows without an id, expected int64 ids")
        ids = column.to_numpy()
        if len(ids) and ids.min() < minimum:
            raise self._error(name, f"has the id {ids.min()}, expected {minimum} or more")
        return ids

    def numbers(
        self, name: str, low: float = -np.inf, high: float = np.inf, missing: float | None = None
    ) -> np.ndarray:
        """A column as float64 [rows], finite and from `low` to `high`; `missing` stands for null where it is given."""
        try:
            column = pc.cast(self._table.column(name), pa.float64())
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise self._error(name, f"is no number: {error}; {self._mend}") from None
        numbers = pc.fill_null(column, float("nan")).to_numpy()
        bad = ~np.isfinite(numbers)
        if missing is not None:
            bad &= pc.is_valid(column).to_numpy()
        if bad.any():
            raise self._error(name, f"has rows without a finite number, {int(bad.sum()):,} in all; {self._mend}")
        outside = (numbers < low) | (numbers > high)
        if outside.any():
            raise self._error(name, f"has the number {numbers[outside][0]:g}, expected {low:g} to {high:g}")
        return numbers if missing is None else np.where(np.isnan(numbers), missing, numbers)

    def _not_text(self, name: str, error: Exception) -> CommandError:
        return self._error(name, f"is not UTF-8 text: {error}; convert the file to UTF-8")

    def _error(self, name: str, problem: str) -> CommandError:
        return CommandError(f"{self.path}: column {name} {problem}")


def _suffix(path: Path) -> str:
    suffixes = path.suffixes
    return suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else "".join(suffixes[-1:])


def _read(path: Path, texts: Sequence[str]) -> pa.Table:
    kind = _suffix(path)
    if kind == ".parquet":
        return pyarrow.parquet.read_table(path)
    if kind == ".jsonl":
        return pyarrow.json.read_json(path)
    # Text is read as bytes, so that bad UTF-8 is reported with its column, and a query "100" stays a text. TSV files
    # are unquoted by custom: a title may hold an inch sign.
    return pyarrow.csv.read_csv(
        path,
        parse_options=pyarrow.csv.ParseOptions(delimiter="\t", quote_char=False)
        if kind == ".tsv"
        else pyarrow.csv.ParseOptions(newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types={text: pa.binary() for text in texts}, strings_can_be_null=False
        ),
    )
