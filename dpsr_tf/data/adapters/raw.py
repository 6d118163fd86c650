"""Functions that the converters share: required files, lines of text, Parquet files, and made-up times."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from dpsr_common.errors import CommandError, UsageError

# Some data sets have folds or an order of events, but no clock. Their times are made up and show the order only:
# training lies before this moment (2001-09-09), held-out interactions at it or after it. The schemas name the same
# number.
HELD_OUT_FROM = 1_000_000_000

# Rows held at a time.
_CHUNK = 65_536


def require(source: Path, names: Sequence[str], publisher: str) -> list[Path]:
    """Returns the paths of all `names` in `source`. Raises UsageError that names missing files and the publisher."""
    if not source.is_dir():
        raise UsageError(f"{source}: no such directory, expected one with {', '.join(names)} of {publisher}")
    missing = [name for name in names if not (source / name).is_file()]
    if missing:
        raise UsageError(
            f"{source}: has no {', '.join(missing)}, expected {', '.join(names)} as published: {publisher}"
        )
    return [source / name for name in names]


def records(
    path: Path, separator: str, kinds: Sequence[Callable[[str], Any]], *, encoding: str = "utf-8", header: bool = False
) -> Iterator[list[Any]]:
    """Yields the first fields of each line of a text file.

    Args:
        path: the file.
        separator: the text between two fields.
        kinds: a function for each field that turns its text into a value.
        encoding: the encoding of the file.
        header: whether the first line holds the names of the fields.

    Raises:
        CommandError: a line has too few fields, or a field has another kind of value. The message names file and line.
    """
    for number, line in lines(path, encoding):
        if header and number == 1:
            continue
        fields = line.split(separator)
        if len(fields) < len(kinds):
            raise CommandError(
                f"{path}: line {number} has {len(fields)} fields, expected at least {len(kinds)} "
                f"with {separator!r} between them"
            )
        try:
            yield [kind(field) for kind, field in zip(kinds, fields, strict=False)]
        except ValueError as error:
            raise CommandError(f"{path}: line {number} is not as published: {error}") from None


def lines(path: Path, encoding: str = "utf-8") -> Iterator[tuple[int, str]]:
    """Yields number, from 1 on, and text of each line that is not empty. Raises CommandError for another encoding."""
    with path.open(encoding=encoding) as file:
        try:
            for number, line in enumerate(file, start=1):
                if text := line.rstrip("\n"):
                    yield number, text
        except UnicodeDecodeError as error:
            raise CommandError(f"{path}: is not {encoding} text: {error}") from None


def write(path: Path, schema: dict[str, pa.DataType], rows: Iterable[Sequence[Any]]) -> None:
    """Writes rows, whose values are in the order of `schema`, to a Parquet file, one chunk after the other."""
    rest = iter(rows)
    with pyarrow.parquet.ParquetWriter(path, pa.schema(list(schema.items()))) as writer:
        while chunk := list(itertools.islice(rest, _CHUNK)):
            columns = zip(*chunk, strict=True)
            arrays = [pa.array(column, kind) for column, kind in zip(columns, schema.values(), strict=True)]
            writer.write_batch(pa.record_batch(arrays, schema=writer.schema))


def write_batches(path: Path, schema: dict[str, pa.DataType], batches: Iterable[pa.RecordBatch]) -> None:
    """Writes record batches of this schema to a Parquet file."""
    with pyarrow.parquet.ParquetWriter(path, pa.schema(list(schema.items()))) as writer:
        for batch in batches:
            if batch.num_rows:
                writer.write_batch(batch)


def id_lists(path: Path) -> Iterator[tuple[int, list[int]]]:
    """Yields user and items of each line `user item item ...`. Raises CommandError that names file and line."""
    for number, line in lines(path):
        try:
            user, *items = map(int, line.split())
        except ValueError:
            raise CommandError(f"{path}: line {number} is {line[:40]!r}, expected `user item item ...`") from None
        yield user, items
