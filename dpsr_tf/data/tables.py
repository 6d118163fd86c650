"""Raw tables from disk into Arrow: Parquet, CSV, TSV and JSON lines, plain or gzip, one file or many."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

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
        if _suffix(path) not in _SUFFIXES:
            raise UsageError(f"{path}: unknown kind of file, expected {', '.join(_SUFFIXES)} (with or without .gz)")
    return found


def read_table(path: Path, texts: Sequence[str], others: Sequence[str]) -> pa.Table:
    """Columns `texts` (as UTF-8 strings) and `others` (types as found) of one file.

    Raises CommandError that names the file and what is wrong with it: empty, unreadable, a missing column, bad UTF-8.
    """
    columns = list(dict.fromkeys([*texts, *others]))
    if path.stat().st_size == 0:
        raise CommandError(f"{path}: is empty, expected a table with columns {', '.join(columns)}")
    try:
        table = _read(path, texts)
    except (pa.ArrowInvalid, pa.ArrowKeyError, OSError) as error:
        raise CommandError(f"{path}: cannot be read as {_suffix(path)[1:]}: {error}") from None
    missing = [column for column in columns if column not in table.column_names]
    if missing:
        raise CommandError(
            f"{path}: has no column {', '.join(missing)}; its columns are {', '.join(table.column_names)}; "
            f"correct the schema"
        )
    table = table.select(columns)
    for text in texts:
        index = table.column_names.index(text)
        try:
            table = table.set_column(index, text, _as_text(table.column(text)))
        except pa.ArrowInvalid as error:
            raise CommandError(f"{path}: column {text} is not UTF-8 text: {error}; convert the file to UTF-8") from None
    return table


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


def _as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.fill_null(pc.cast(column, pa.large_string()), "")
