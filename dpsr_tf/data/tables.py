"""Reads raw tables into Arrow batches: Parquet, Arrow, CSV, TSV and JSON lines, one file or many, of any size.

Files are read in pieces. CSV, TSV and JSON lines have no types: each value is read as text, so that no piece depends on
the values of another one. A JSON number is the text of the number, but 5.0 becomes "5". column_values.py turns text
into numbers, ids and times. Text stays bytes until then, so that bad UTF-8 concerns only its own row.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import functools
import glob
import io
import json
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from dpsr_common.errors import CommandError, UsageError
from dpsr_common.object_store import is_remote
from dpsr_tf.data.column_values import ids_of, is_text, numbers_of, texts_of

_ARROW = (".arrow", ".feather", ".ipc")
_JSON = (".jsonl", ".json")
_COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
# The known endings of file names. Text files may have .gz or .zst in addition.
SUFFIXES = (".parquet", ".csv", ".tsv", *_JSON, *_ARROW)

# Bytes of a text file that are parsed at a time. Arrow reads 32 such blocks ahead. A longer row is an error.
_BLOCK_BYTES = 1 << 20
# Bytes of a Parquet column that are read at a time.
_BUFFER_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Source:
    """Some neighbouring rows of a file.

    Attributes:
        path: the file.
        first_row: the number of the first of these rows in the file, from 0. Headers and empty lines do not count.
        batch: the requested columns, in the requested order.
    """

    path: Path
    first_row: int
    batch: pa.RecordBatch


def find_files(patterns: Sequence[str], base: Path) -> list[Path]:
    """Finds the files of a table.

    Args:
        patterns: files, directories or glob patterns, relative to `base`.
        base: a directory.

    Returns:
        The files of each pattern, sorted by name. A file that several patterns match is there once.

    Raises:
        UsageError: a pattern matches no file, or a file of a kind that cannot be read.
    """
    found: list[Path] = []
    for pattern in patterns:
        if is_remote(pattern):
            raise UsageError(f"{pattern}: tables are read from file systems of this machine; copy or mount them first")
        path = base / pattern
        try:
            if path.is_dir():
                matches = sorted(p for p in path.iterdir() if p.is_file() and _kind(p))
            elif path.is_file():
                matches = [path]
            else:
                matches = [Path(p) for p in sorted(glob.glob(str(path))) if Path(p).is_file()]
        except OSError as error:
            raise UsageError(f"{path}: cannot be read: {error.strerror}; correct its permissions") from None
        if not matches:
            raise UsageError(f"{path}: no such file; correct the path, --input, or `files` in the schema")
        found += matches
    for path in found:
        check_kind(path)
    return list(dict.fromkeys(found))


def check_kind(path: Path) -> None:
    """Raises UsageError if the name of a file does not have one of the known endings."""
    if not _kind(path):
        raise UsageError(
            f"{path}: unknown kind of file, expected {', '.join(SUFFIXES)} (text files with or without .gz or .zst)"
        )


def read_batches(
    files: Sequence[Path],
    texts: Sequence[str],
    others: Sequence[str],
    batch_rows: int = 65_536,
    mend: str = "correct the schema",
) -> Iterator[Source]:
    """Reads some columns of files, one file after another. The memory does not grow with their size.

    Args:
        files: the files. The ending of the name says of what kind a file is.
        texts: columns with text or ids.
        others: further columns.
        batch_rows: the largest number of rows in a batch.
        mend: for error messages, what to do about a missing column.

    Yields:
        Batches with the columns `texts`, then `others`, each name once. Columns of CSV, TSV and JSON lines are
        large_binary. If a JSON column holds a list somewhere in the batch, it is large_list<large_binary>, and its
        other values are lists with one element. Columns of Parquet and Arrow files have the file's type, except that
        text is large_binary, and nothing is dictionary-encoded.

    Raises:
        CommandError: a file is empty, damaged or unreadable, or a column is missing, appears twice, or has a type other
            than text, numbers, times or lists of these.
    """
    columns = list(dict.fromkeys([*texts, *others]))
    for path in files:
        with _readable(path):
            if path.stat().st_size == 0:
                raise CommandError(f"{path}: is empty, expected a table with columns {', '.join(columns)}")
            first_row = 0
            check = functools.partial(_check_columns, path, columns, mend=mend)
            for batch in _read_with(check, path, columns, batch_rows):
                for begin in range(0, len(batch), batch_rows):
                    rows = _plain(path, batch.slice(begin, batch_rows))
                    yield Source(path, first_row, rows)
                    first_row += len(rows)


def count_ids(files: Sequence[Path], column: str) -> tuple[int, int]:
    """Returns how many ids of a column are not whole numbers as they are usually written, and how many there are."""
    strange = total = 0
    for source in read_batches(files, [column], []):
        ids = source.batch[column]
        total += len(ids) - ids.null_count
        kind = ids.type
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            ids, kind = ids.cast(pa.large_binary()).view(pa.large_string()), pa.large_string()
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            whole = pc.match_substring_regex(ids, r"^\s*(0|-?[1-9][0-9]{0,18})\s*$")
            strange += pc.sum(pc.invert(whole)).as_py() or 0
    return strange, total


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns the errors of reading a file into a CommandError that names it."""
    try:
        yield
    except UnicodeError:
        raise CommandError(f"{path}: the name of a column is not UTF-8; convert the file to UTF-8") from None
    except (pa.ArrowException, OSError, csv.Error) as error:
        reason = " ".join(str(error).split())
        raise CommandError(f"{path}: cannot be read as {_kind(path)[1:]}: {reason[:500]}") from None


def column_names(path: Path) -> list[str]:
    """Returns the names of the columns of a file that is not JSON lines. Raises CommandError as read_batches."""
    found: list[str] = []

    def keep(names: Sequence[str]) -> None:
        found.extend(names)
        raise _Enough

    with _readable(path), contextlib.suppress(_Enough):
        next(_read_with(keep, path, [], 1), None)
    return found


class _Enough(Exception):
    pass


def read_rows(path: Path) -> Iterator[list[dict[str, Any]]]:
    """Reads the objects of a file of JSON lines, some at a time, for rows_batch. Raises CommandError."""
    with _readable(path):
        yield from _json_rows(path)


def is_json(path: Path) -> bool:
    """Whether a file is one of JSON lines, by its name."""
    return _kind(path) in _JSON


def rows_batch(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> pa.RecordBatch:
    """Returns some columns of rows, as read_batches returns those of JSON lines. A column that a row lacks is null."""
    return pa.record_batch([_json_column([row.get(column) for row in rows]) for column in columns], names=list(columns))


class Table:
    """Some columns of one file, in memory.

    Methods raise CommandError for bad values. The message names file and column, and says what to do.
    """

    def __init__(self, path: Path, texts: Sequence[str], others: Sequence[str], mend: str = "correct the schema"):
        """Reads a file.

        Args:
            path: the file. The ending of its name says of what kind it is.
            texts: columns with text, whatever it looks like: a query may be "100".
            others: columns with other values.
            mend: for error messages, what to do about a column that is missing or has an unexpected type.

        Raises:
            CommandError: as in read_batches.
        """
        self.path, self._mend = path, mend
        self._batches = [source.batch for source in read_batches([path], texts, others, mend=mend)]

    def __len__(self) -> int:
        """Returns the number of rows."""
        return sum(map(len, self._batches))

    def text(self, name: str) -> pa.ChunkedArray:
        """Returns a column as large_string [rows]; null becomes empty text."""
        chunks = []
        for batch in self._batches:
            texts, bad = texts_of(batch[name])
            self._check(batch, name, bad, "is not UTF-8 text: {}; convert the file to UTF-8")
            chunks.append(pc.fill_null(texts, ""))
        return pa.chunked_array(chunks, pa.large_string())

    def ids(self, name: str, minimum: int = -(2**63)) -> np.ndarray:
        """Returns a column of ids as int64 [rows]. All of them must be `minimum` or more."""
        parts = [ids_of(batch[name], False) for batch in self._batches]
        for batch, ids in zip(self._batches, parts, strict=True):
            self._check(batch, name, ids.wrong, "has the id {}, expected a whole number (int64)")
        missing = sum(int(ids.missing.sum()) for ids in parts)
        if missing:
            raise self._error(name, f"has {missing:,} rows without an id, expected a whole number (int64) in each row")
        values = np.concatenate([np.zeros(0, np.int64), *(ids.values for ids in parts)])
        if len(values) and values.min() < minimum:
            raise self._error(name, f"has the id {values.min()}, expected {minimum} or more")
        return values

    def numbers(
        self, name: str, low: float = -np.inf, high: float = np.inf, missing: float | None = None
    ) -> np.ndarray:
        """Returns a column as float64 [rows].

        Args:
            name: the column.
            low: the smallest number that is allowed.
            high: the largest number that is allowed.
            missing: stands for missing numbers; if None, a missing number is an error.
        """
        chunks = [np.zeros(0)]
        for batch in self._batches:
            values, _, bad = numbers_of(batch[name])
            self._check(batch, name, bad, f"has the value {{}}, expected a number; {self._mend}")
            chunks.append(values)
        numbers = np.concatenate(chunks)
        without = np.isinf(numbers) if missing is not None else ~np.isfinite(numbers)
        if without.any():
            raise self._error(name, f"has {int(without.sum()):,} rows without a finite number; {self._mend}")
        outside = (numbers < low) | (numbers > high)
        if outside.any():
            raise self._error(name, f"has the number {numbers[outside][0]:g}, expected {low:g} to {high:g}")
        return numbers if missing is None else np.where(np.isnan(numbers), missing, numbers)

    def _check(self, batch: pa.RecordBatch, name: str, bad: np.ndarray, problem: str) -> None:
        if bad.any():
            value = batch[name][int(np.argmax(bad))].as_py()
            if isinstance(value, bytes):
                value = value.decode(errors="replace")
            raise self._error(name, problem.format(repr(value)[:200]))

    def _error(self, name: str, problem: str) -> CommandError:
        return CommandError(f"{self.path}: column {name} {problem}")


def _kind(path: Path) -> str:
    """Returns the ending of a file's name that says of what kind the file is; "" if it is unknown."""
    *others, last = ["", *path.suffixes]
    if last in _COMPRESSED:
        return others[-1] if others and others[-1] in (".csv", ".tsv", *_JSON) else ""
    return last if last in SUFFIXES else ""


def _read_with(check: Any, path: Path, columns: list[str], batch_rows: int) -> Iterator[pa.RecordBatch]:
    """Reads columns of a file. Calls `check` with the names of all its columns first."""
    kind = _kind(path)
    if kind == ".parquet":
        return _read_parquet(path, columns, batch_rows, check)
    if kind in _ARROW:
        return _read_arrow(path, columns, check)
    if kind in _JSON:
        return _read_json(path, columns, check)
    return _read_csv(path, columns, kind, check)


def _check_columns(path: Path, columns: Sequence[str], names: Sequence[str], mend: str) -> None:
    missing = [column for column in columns if column not in names]
    if missing:
        raise CommandError(f"{path}: has no column {', '.join(missing)}; its columns are {', '.join(names)}; {mend}")
    twice = [column for column in columns if names.count(column) > 1]
    if twice:
        raise CommandError(f"{path}: column {twice[0]} appears more than once; rename one of them")


def _open(path: Path) -> pa.NativeFile:
    return pa.input_stream(str(path), compression=_COMPRESSED.get(path.suffix))


def _read_parquet(path: Path, columns: list[str], batch_rows: int, check: Any) -> Iterator[pa.RecordBatch]:
    # Without a buffer Arrow reads a whole column of a row group at a time, which may be large.
    with pyarrow.parquet.ParquetFile(
        path, buffer_size=_BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True
    ) as file:
        check(file.schema_arrow.names)
        for batch in file.iter_batches(batch_rows, columns=columns, use_threads=False):
            yield batch.select(columns)


def _read_arrow(path: Path, columns: list[str], check: Any) -> Iterator[pa.RecordBatch]:
    with pa.memory_map(str(path)) as source:
        if source.read(6) == b"ARROW1":
            file = pa.ipc.open_file(source)
            check(file.schema.names)
            fields = [file.schema.get_field_index(column) for column in columns]
            file = pa.ipc.open_file(source, options=pa.ipc.IpcReadOptions(included_fields=fields))
            batches = (file.get_batch(i) for i in range(file.num_record_batches))
        else:
            source.seek(0)
            batches = pa.ipc.open_stream(source)
            check(batches.schema.names)
        for batch in batches:
            yield pa.record_batch([_checked(batch[column]) for column in columns], names=columns)


def _checked(column: pa.Array) -> pa.Array:
    """Returns a column of an Arrow file. Raises ArrowInvalid if its offsets or indices are out of bounds."""
    column = column.view(_as_bytes(column.type))
    column.validate(full=True)
    return column


def _as_bytes(kind: pa.DataType) -> pa.DataType:
    """Returns the type with the same layout in which text is bytes, which need not be UTF-8."""
    t = pa.types
    if t.is_dictionary(kind):
        return pa.dictionary(kind.index_type, _as_bytes(kind.value_type), kind.ordered)
    if t.is_list(kind) or t.is_large_list(kind):
        return (pa.list_ if t.is_list(kind) else pa.large_list)(_as_bytes(kind.value_type))
    if t.is_string(kind):
        return pa.binary()
    if t.is_large_string(kind):
        return pa.large_binary()
    return pa.binary_view() if t.is_string_view(kind) else kind


def _read_csv(path: Path, columns: list[str], kind: str, check: Any) -> Iterator[pa.RecordBatch]:
    # TSV files have no quotes by convention: a title may hold an inch sign.
    tsv = kind == ".tsv"
    with _open(path) as stream:
        lines = csv.reader(
            io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline=""),
            delimiter="\t" if tsv else ",",
            quoting=csv.QUOTE_NONE if tsv else csv.QUOTE_MINIMAL,
        )
        names = next(filter(None, lines), [])
    # Raises UnicodeError if the names were not UTF-8.
    "".join(names).encode()
    check(names)
    convert = pyarrow.csv.ConvertOptions(
        include_columns=columns,
        column_types={column: pa.large_binary() for column in columns},
        strings_can_be_null=False,
    )
    parse = pyarrow.csv.ParseOptions(
        delimiter="\t" if tsv else ",", quote_char=False if tsv else '"', newlines_in_values=not tsv
    )
    read = pyarrow.csv.ReadOptions(block_size=_BLOCK_BYTES)
    with _open(path) as stream:
        source = _WholeLineEnds(stream)
        try:
            yield from pyarrow.csv.open_csv(source, read_options=read, parse_options=parse, convert_options=convert)
        finally:
            source.wait()


class _WholeLineEnds(io.RawIOBase):
    """A stream whose reads never end between CR and LF, because Arrow would lose the LF there, even in quotes."""

    def __init__(self, stream: pa.NativeFile):
        super().__init__()
        self._stream, self._held = stream, b""
        # What Arrow has read and may still hold. A memoryview, other than bytes, can be referred to weakly.
        self._read: list[weakref.ref[memoryview]] = []

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> memoryview:
        data: bytes = self._held + self._stream.read(size - len(self._held))
        self._held = b"\r" if len(data) > 1 and data.endswith(b"\r") else b""
        found = memoryview(data.removesuffix(self._held))
        self._read = [*(held for held in self._read if held() is not None), weakref.ref(found)]
        return found

    def wait(self) -> None:
        """Returns when Arrow's threads hold nothing of the stream any more, or after 10 seconds.

        They drop the last pieces a moment after the last batch, and take Python's lock for it. If Python ends at this
        moment, the process aborts.
        """
        end = time.monotonic() + 10
        while any(held() is not None for held in self._read) and time.monotonic() < end:
            time.sleep(0.0005)


def _read_json(path: Path, columns: list[str], check: Any) -> Iterator[pa.RecordBatch]:
    # Not every row has every column: the file is searched until all columns have been seen.
    names: dict[str, None] = {}
    for rows in _json_rows(path):
        for row in rows:
            names.update(dict.fromkeys(row))
        if all(column in names for column in columns):
            break
    check(list(names))
    for rows in _json_rows(path):
        yield rows_batch(rows, columns)


def _json_rows(path: Path) -> Iterator[list[dict[str, Any]]]:
    """Yields the objects of a file, some at a time, with numbers as text."""
    # Bytes that are not UTF-8 become lone surrogates here. _json_bytes turns them into the same bytes again.
    decode = json.JSONDecoder(parse_float=_json_float, parse_int=str, parse_constant=str).decode
    number, rest = 0, b""
    with _open(path) as stream:
        while True:
            block = stream.read(_BLOCK_BYTES)
            *lines, rest = (rest + block).split(b"\n")
            if not block:
                lines, rest = [rest], b""
            if len(rest) > _BLOCK_BYTES:
                raise pa.ArrowInvalid(f"line {number + len(lines) + 1} is longer than {_BLOCK_BYTES:,} bytes")
            rows = []
            for line in lines:
                number += 1
                text = (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).decode(errors="surrogateescape")
                if not text.strip():
                    continue
                try:
                    row = decode(text)
                except (ValueError, RecursionError) as error:
                    raise pa.ArrowInvalid(f"line {number}: {error}") from None
                if not isinstance(row, dict):
                    raise pa.ArrowInvalid(f"line {number} is not a JSON object, expected one JSON object per line")
                rows.append(row)
            if rows:
                yield rows
            if not block:
                return


def _json_float(text: str) -> str:
    return text.removesuffix(".0")


def _json_column(values: list[Any]) -> pa.Array:
    if any(isinstance(value, list) for value in values):
        lists = [value if isinstance(value, list) or value is None else [value] for value in values]
        return pa.array(
            [None if value is None else list(map(_json_bytes, value)) for value in lists],
            pa.large_list(pa.large_binary()),
        )
    return pa.array(list(map(_json_bytes, values)), pa.large_binary())


def _json_bytes(value: Any) -> bytes | None:
    if value is None:
        return None
    if not isinstance(value, str):
        value = json.dumps(value, ensure_ascii=False)
    try:
        return value.encode()
    except UnicodeEncodeError:
        try:
            return value.encode(errors="surrogateescape")
        except UnicodeEncodeError:
            # The text has an escape such as \ud800.
            return value.encode(errors="surrogatepass")


def _plain(path: Path, batch: pa.RecordBatch) -> pa.RecordBatch:
    """Converts columns to the types that read_batches returns."""
    columns = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if isinstance(column, pa.ExtensionArray):
            column = column.storage
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        kind, t = column.type, pa.types
        value = kind.value_type if t.is_list(kind) or t.is_large_list(kind) or t.is_fixed_size_list(kind) else kind
        if t.is_nested(value) or t.is_time(value) or t.is_duration(value) or t.is_interval(value):
            raise CommandError(
                f"{path}: column {name} has type {kind}, expected text, numbers, times, or lists of these; "
                f"write it as one of these"
            )
        columns[name] = pc.cast(column, pa.large_binary()) if is_text(kind) else column
    return pa.record_batch(columns)
