"""Raw tables from disk into Arrow: Parquet, Arrow, CSV, TSV and JSON lines, one file or many, of any size.

Files are read in pieces. In CSV, TSV and JSON lines, which have no types, every value is text (a JSON number too, as it
is written, but 5.0 as "5"), so that no piece depends on what another holds; encode.py makes numbers, ids and times of
it. Text is bytes until then: bad UTF-8 is a matter of its row.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import glob
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from dpsr_common.errors import CommandError, UsageError
from dpsr_tf.data.column_values import ids_of, is_text, numbers_of, texts_of

_ARROW = (".arrow", ".feather", ".ipc")
_JSON = (".jsonl", ".json")
_COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
# Kinds of files. Those of text may have .gz or .zst after it.
SUFFIXES = (".parquet", ".csv", ".tsv", *_JSON, *_ARROW)

# Bytes of a text file that are parsed at a time; a row that is longer is an error. (Arrow reads 32 blocks ahead.)
_BLOCK_BYTES = 1 << 20
# Bytes of a Parquet column that are read at a time.
_BUFFER_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Source:
    """Some rows of a file.

    Attributes:
        path: the file.
        first_row: number of the first of them in the file, from 0 on; header and empty lines are no rows.
        batch: the columns asked for, in that order.
    """

    path: Path
    first_row: int
    batch: pa.RecordBatch


def find_files(patterns: Sequence[str], base: Path) -> list[Path]:
    """The files that `patterns` (files, directories, globs; relative to `base`) name, each pattern's in order of name.

    Raises UsageError if a pattern names none, or a file of a kind that cannot be read.
    """
    found: list[Path] = []
    for pattern in patterns:
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
            raise UsageError(f"{path}: no such file; give --input, or correct `files` in the schema")
        found += matches
    for path in found:
        check_kind(path)
    return found


def check_kind(path: Path) -> None:
    """Raises UsageError if `path` does not end as a table's file does."""
    if not _kind(path):
        raise UsageError(
            f"{path}: unknown kind of file, expected {', '.join(SUFFIXES)} (those of text with or without .gz or .zst)"
        )


def read_batches(
    files: Sequence[Path],
    texts: Sequence[str],
    others: Sequence[str],
    batch_rows: int = 65_536,
    mend: str = "correct the schema",
) -> Iterator[Source]:
    """Reads some columns of files, one after another, in memory that does not grow with their size.

    Args:
        files: the files; the ending of each says of what kind it is.
        texts: columns of text, and of ids.
        others: further columns.
        batch_rows: rows of a batch at most.
        mend: what to do about a column that is missing.

    Yields:
        Batches with columns `texts`, then `others`, each name once. Those of CSV, TSV and JSON lines are large_binary;
        a JSON column that holds a list somewhere in the batch is large_list<large_binary>, other values lists of one.
        Those of Parquet and Arrow files are of the file's type, but text is large_binary, not dictionary-encoded.

    Raises:
        CommandError: a file is empty, damaged or unreadable, or a column is missing, stands twice, or is of a type
            that holds neither text nor numbers nor times nor lists of them.
    """
    columns = list(dict.fromkeys([*texts, *others]))
    for path in files:
        try:
            if path.stat().st_size == 0:
                raise CommandError(f"{path}: is empty, expected a table with columns {', '.join(columns)}")
            first_row = 0
            for batch in _read(path, columns, batch_rows, mend):
                for begin in range(0, len(batch), batch_rows):
                    rows = _plain(path, batch.slice(begin, batch_rows))
                    yield Source(path, first_row, rows)
                    first_row += len(rows)
        except UnicodeError:
            raise CommandError(f"{path}: a column's name is not UTF-8; convert the file to UTF-8") from None
        except (pa.ArrowException, OSError, csv.Error) as error:
            reason = " ".join(str(error).split())
            raise CommandError(f"{path}: cannot be read as {_kind(path)[1:]}: {reason[:500]}") from None


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
            CommandError: as read_batches.
        """
        self.path, self._mend = path, mend
        self._batches = [source.batch for source in read_batches([path], texts, others, mend=mend)]

    def __len__(self) -> int:
        """Rows."""
        return sum(map(len, self._batches))

    def text(self, name: str) -> pa.ChunkedArray:
        """A column as large_string [rows]; null is the empty text."""
        chunks = []
        for batch in self._batches:
            texts, bad = texts_of(batch[name])
            self._check(batch, name, bad, "is not UTF-8 text: {}; convert the file to UTF-8")
            chunks.append(pc.fill_null(texts, ""))
        return pa.chunked_array(chunks, pa.large_string())

    def ids(self, name: str, minimum: int = -(2**63)) -> np.ndarray:
        """A column as int64 [rows], all `minimum` or more."""
        found = [ids_of(batch[name], False) for batch in self._batches]
        for batch, ids in zip(self._batches, found, strict=True):
            self._check(batch, name, ids.wrong, "is no whole number: {}; expected int64 ids")
        missing = sum(int(ids.missing.sum()) for ids in found)
        if missing:
            raise self._error(name, f"has {missing:,} rows without an id, expected int64 ids")
        values = np.concatenate([np.zeros(0, np.int64), *(ids.values for ids in found)])
        if len(values) and values.min() < minimum:
            raise self._error(name, f"has the id {values.min()}, expected {minimum} or more")
        return values

    def numbers(
        self, name: str, low: float = -np.inf, high: float = np.inf, missing: float | None = None
    ) -> np.ndarray:
        """A column as float64 [rows], finite and from `low` to `high`; `missing` stands for null where it is given."""
        chunks = [np.zeros(0)]
        for batch in self._batches:
            values, _, bad = numbers_of(batch[name])
            self._check(batch, name, bad, f"is no number: {{}}; {self._mend}")
            chunks.append(values)
        numbers = np.concatenate(chunks)
        without = np.isinf(numbers) if missing is not None else ~np.isfinite(numbers)
        if without.any():
            raise self._error(name, f"has rows without a finite number, {int(without.sum()):,} in all; {self._mend}")
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
    """The suffix that says of what kind a file is; "" if none does."""
    *others, last = ["", *path.suffixes]
    if last in _COMPRESSED:
        return others[-1] if others and others[-1] in (".csv", ".tsv", *_JSON) else ""
    return last if last in SUFFIXES else ""


def _read(path: Path, columns: list[str], batch_rows: int, mend: str) -> Iterator[pa.RecordBatch]:
    kind = _kind(path)
    check = functools.partial(_check_columns, path, columns, mend=mend)
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
        raise CommandError(f"{path}: column {twice[0]} stands more than once; rename one of them")


def _open(path: Path) -> pa.NativeFile:
    return pa.input_stream(str(path), compression=_COMPRESSED.get(path.suffix))


def _read_parquet(path: Path, columns: list[str], batch_rows: int, check: Any) -> Iterator[pa.RecordBatch]:
    # Buffered: else whole columns of a row group, which may be large, are read at a time.
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
    """A column of an Arrow file. Raises ArrowInvalid if its offsets or indices lead astray."""
    column = column.view(_as_bytes(column.type))
    column.validate(full=True)
    return column


def _as_bytes(kind: pa.DataType) -> pa.DataType:
    """The type of the same layout where text is bytes, which need not be UTF-8."""
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
    # TSV files are unquoted by custom: a title may hold an inch sign.
    tsv = kind == ".tsv"
    with _open(path) as stream:
        lines = csv.reader(
            io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline=""),
            delimiter="\t" if tsv else ",",
            quoting=csv.QUOTE_NONE if tsv else csv.QUOTE_MINIMAL,
        )
        names = next(filter(None, lines), [])
    "".join(names).encode()  # an error if they were not UTF-8
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
        yield from pyarrow.csv.open_csv(
            _WholeLineEnds(stream), read_options=read, parse_options=parse, convert_options=convert
        )


class _WholeLineEnds(io.RawIOBase):
    """A stream whose reads never end between CR and LF: there Arrow loses the LF, even in quotes."""

    def __init__(self, stream: pa.NativeFile):
        super().__init__()
        self._stream, self._held = stream, b""

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data: bytes = self._held + self._stream.read(size - len(self._held))
        self._held = b"\r" if len(data) > 1 and data.endswith(b"\r") else b""
        return data.removesuffix(self._held)


def _read_json(path: Path, columns: list[str], check: Any) -> Iterator[pa.RecordBatch]:
    # A column may begin late: the file is searched for those that its first rows do not have.
    names: dict[str, None] = {}
    for rows in _json_rows(path):
        for row in rows:
            names.update(dict.fromkeys(row))
        if all(column in names for column in columns):
            break
    check(list(names))
    for rows in _json_rows(path):
        yield pa.record_batch([_json_column([row.get(column) for row in rows]) for column in columns], names=columns)


def _json_rows(path: Path) -> Iterator[list[dict[str, Any]]]:
    """The objects of a file, numbers as text, some at a time."""
    # Bytes that are no UTF-8 become lone surrogates, and bytes again later.
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
                    raise pa.ArrowInvalid(f"line {number} holds no object, expected one JSON object a line")
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
        except UnicodeEncodeError:  # an escape such as \ud800
            return value.encode(errors="surrogatepass")


def _plain(path: Path, batch: pa.RecordBatch) -> pa.RecordBatch:
    """With columns of the types that read_batches promises."""
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
                f"{path}: column {name} is of type {kind}, expected text, numbers, times, or a list of them; "
                f"write it as one of these"
            )
        columns[name] = pc.cast(column, pa.large_binary()) if is_text(kind) else column
    return pa.record_batch(columns)
