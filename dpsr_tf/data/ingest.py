"""`dpsr ingest`: turns raw tables into a store."""

from __future__ import annotations

import bisect
import collections
import dataclasses
import errno
import heapq
import itertools
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NoReturn

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from absl import flags
from tqdm import tqdm

from dpsr_common.errors import CommandError, UsageError
from dpsr_common.packed_file import PackedFile
from dpsr_common.typed_config import to_dict
from dpsr_tf.data.adapters import Adapter, open_adapter
from dpsr_tf.data.assemble import Assembler, ordered
from dpsr_tf.data.encode import Encoded, IdIndex, encode_interactions, encode_items, encode_users
from dpsr_tf.data.schema import Feature, Filter, Schema, load_schema
from dpsr_tf.data.store import FORMAT, FORMAT_VERSION, Counts, file_names, manifest_checksum, new_directory
from dpsr_tf.data.tables import Source, find_files, read_batches

USAGE = """
Usage: dpsr ingest --schema=FILE --out=STORE
       dpsr ingest --adapter=NAME --input=DIR --out=STORE

Turns raw tables (Parquet, Arrow, CSV, TSV, JSON lines; .gz and .zst too) into a store that `dpsr train` reads. The
schema file says which columns are what; an adapter is a ready schema for a data set that is known by name.
Rows that cannot be used are left out and listed, with the reason, in a file beside the store.
"""

REQUIRED_FLAGS = ("out",)

# Rows that are encoded at a time.
_BATCH_ROWS = 1 << 16
# So many rejects, and too large a share of the rows so far: the job is hopeless.
_HOPELESS = 1_000_000


def define_flags(values: flags.FlagValues) -> None:
    """Flags of `dpsr ingest`."""
    flags.DEFINE_string("schema", None, "schema file (YAML)", flag_values=values)
    flags.DEFINE_string("adapter", None, "ready schema, by name", flag_values=values)
    flags.DEFINE_string("input", None, "directory that the schema's files are relative to", flag_values=values)
    flags.DEFINE_string("out", None, "directory of the store, made by this command", flag_values=values)
    flags.DEFINE_boolean("overwrite", False, "replaces a store that is there", flag_values=values)
    flags.DEFINE_float(
        "max_reject_fraction", 0.01, "share of unusable rows of a table that stops the job", flag_values=values
    )
    flags.DEFINE_string(
        "rejects", None, "file for the unusable rows; OUT.rejects.jsonl if left out", flag_values=values
    )
    flags.DEFINE_integer("shards", 1, "interaction files; each has all interactions of its queries", flag_values=values)
    flags.DEFINE_integer("threads", 0, "threads; 0 is one a core", flag_values=values)
    flags.DEFINE_string(
        "memory", "256MB", "for sorting and joining; what does not fit goes to disk beside --out", flag_values=values
    )


def run(values: flags.FlagValues, arguments: list[str]) -> None:
    """Runs `dpsr ingest`."""
    if bool(values.schema) == bool(values.adapter):
        given = "both are given" if values.schema else "neither is given"
        raise UsageError(f"{given}: give either --schema=FILE or --adapter=NAME")
    if values.adapter is not None and values.input is None:
        raise UsageError(f"--adapter={values.adapter} needs --input, the directory of the downloaded files")
    if not 0 <= values.max_reject_fraction <= 1:
        raise UsageError(f"--max_reject_fraction={values.max_reject_fraction:g}: expected a share, 0 to 1")
    if not 1 <= values.shards <= 99_999:
        raise UsageError(f"--shards={values.shards}: expected 1 to 99999")
    if not 0 <= values.threads <= 1024:
        raise UsageError(f"--threads={values.threads}: expected 0 to 1024")
    memory = _memory(values.memory)
    adapter = open_adapter(values.adapter) if values.adapter else None
    schema_path = adapter.schema_path if adapter else Path(values.schema)
    schema = load_schema(schema_path)
    base = Path(values.input) if values.input else schema_path.parent
    out = Path(values.out)
    rejects = Path(values.rejects) if values.rejects else out.resolve().with_name(f"{out.resolve().name}.rejects.jsonl")
    with (
        terminable() as signals,
        new_directory(out, values.overwrite, "store", "manifest.json") as temporary,
        heeded(signals),
    ):
        if adapter is not None:
            base = _converted(adapter, base, temporary)
        counts = ingest(
            schema,
            base,
            temporary,
            values.max_reject_fraction,
            rejects=rejects,
            shards=values.shards,
            threads=values.threads,
            memory=memory,
        )
        shutil.rmtree(temporary / _CONVERTED, ignore_errors=True)
    print(
        f"store {values.out}: {counts.items:,} items, {counts.users:,} users, {counts.queries:,} queries, "
        f"{counts.positives:,} positive pairs, {counts.negatives:,} supervised negatives, "
        f"{counts.impressions:,} unclicked impressions, {counts.held_out:,} pairs held out"
    )


def ingest(
    schema: Schema,
    base: Path,
    out: Path,
    max_reject_fraction: float = 0.01,
    *,
    rejects: Path | None = None,
    shards: int = 1,
    threads: int = 0,
    memory: int = 256 * 10**6,
    batch_rows: int = _BATCH_ROWS,
) -> Counts:
    """Writes the files of a store into the directory `out`, the manifest last.

    The same rows give the same store, byte for byte, in whatever order and files they come and with whatever number of
    threads, memory and batch size; but of two items or users with one id the first is kept.

    Args:
        schema: what the columns are.
        base: directory that the schema's files are relative to.
        out: an existing, empty directory.
        max_reject_fraction: share of unusable rows, of items, of users and of interactions, that is still accepted;
            they are left out.
        rejects: file for the unusable rows, one JSON object a line (file, row from 1 on, table, reason, value), in the
            order of the input; it is there only if there is one. OUT.rejects.jsonl if None.
        shards: interaction files.
        threads: how many work; 0 is one a core.
        memory: bytes for sorting, joining and counting. The process takes this, some 300 MB for itself, and some 20
            bytes for each item and user.
        batch_rows: rows that are encoded at a time.

    Raises:
        CommandError: a file cannot be read, too many rows cannot be used, the rows give no store, or disk or memory
            do not suffice; the message names file and column, or the flag.
    """
    threads = threads or os.cpu_count() or 1
    files = {
        "items": find_files(schema.items.files, base),
        "users": find_files(schema.users.files, base) if schema.users else [],
        "interactions": find_files(schema.interactions.files, base),
    }
    with (
        _explained(out, memory),
        _Rejects(rejects or out.with_name(f"{out.name}.rejects.jsonl"), max_reject_fraction) as rejected,
    ):
        with Assembler(schema, out, threads, memory) as store, ThreadPoolExecutor(threads) as pool:
            reader = _Reader(store, pool, threads, batch_rows, rejected)
            s, u, log = schema.items, schema.users, schema.interactions
            columns = _columns([*s.text, s.title, s.id], [s.popularity], [*s.features, *s.filters])
            text_items = _ids_are_text(files["items"], s.id, columns)
            reader.read("items", files["items"], *columns, lambda batch: encode_items(batch, s, text_items))
            if len(store.ids("items")) == 0:
                raise CommandError(f"{files['items'][0]}: has no row that can be used, expected at least one item")
            text_users = False
            if u is None:
                store.close_table("users")
            else:
                columns = _columns([u.id], [], u.features)
                text_users = _ids_are_text(files["users"], u.id, columns)
                reader.read("users", files["users"], *columns, lambda batch: encode_users(batch, u, text_users))
            items, users = IdIndex(store.ids("items")), IdIndex(store.ids("users")) if log.user else None
            columns = _columns(
                [log.query, log.item, log.user, log.type, log.session],
                [log.time, log.position, log.weight, log.label],
                [],
            )
            reader.read(
                "interactions",
                files["interactions"],
                *columns,
                lambda batch: encode_interactions(batch, log, items, users, text_items, text_users),
            )
            counts, features = store.write(shards)
        counts = dataclasses.replace(counts, rejected=rejected.total)
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "counts": dataclasses.asdict(counts),
            "shards": shards,
            "files": {
                name: f"{PackedFile(out / name, verify=False).fingerprint:016x}" for name in file_names(schema, shards)
            },
            "features": {
                table: [{key: value for key, value in feature.items() if value not in (None, [])} for feature in stored]
                for table, stored in to_dict(features).items()
            },
            "schema": to_dict(schema),
        }
        manifest["checksum"] = manifest_checksum(manifest)
        (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        rejected.report()
    return counts


# Reading.


class _Reader:
    """Reads tables, encodes them on all threads, and hands rows to the assembler and to the rejects."""

    def __init__(self, store: Assembler, pool: ThreadPoolExecutor, threads: int, batch_rows: int, rejects: _Rejects):
        self._store, self._pool, self._threads = store, pool, threads
        self._batch_rows, self._rejects = batch_rows, rejects

    def read(
        self,
        table: str,
        files: Sequence[Path],
        texts: Sequence[str],
        others: Sequence[str],
        encode: Callable[[pa.RecordBatch], Encoded],
    ) -> None:
        """Reads all of a table. Raises CommandError where more rows cannot be used than are accepted."""
        self._rejects.begin(table, files)
        has_ids = table != "interactions"
        starts: list[int] = []
        sources: list[tuple[Path, int]] = []
        count = 0

        def encoded(source: Source) -> tuple[Source, Encoded]:
            return source, encode(source.batch)

        batches = read_batches(files, texts, others, self._batch_rows)
        with tqdm(desc=f"{'read ' + table:<16}", unit=" rows", unit_scale=True) as bar:
            for source, result in ordered(self._pool, encoded, batches, self._threads):
                rows = source.batch.num_rows
                bad = result.rejects["row"].to_numpy()
                self._rejects.add(source, result.rejects)
                numbers = np.delete(np.arange(count, count + rows), np.unique(bad)) if has_ids else None
                self._store.add(table, result.rows, numbers)
                starts.append(count)
                sources.append((source.path, source.first_row - count))
                count += rows
                self._rejects.check(count, False)
                bar.update(rows)
        if has_ids:

            def place(number: int) -> tuple[Path, int]:
                path, offset = sources[bisect.bisect_right(starts, number) - 1]
                return path, number + offset

            numbers, values = self._store.close_table(table)
            self._rejects.merge(
                (*place(int(number)), f"{table[:-1]} id stands more than once", value)
                for number, value in zip(numbers, values, strict=True)
            )
        self._rejects.check(count, True)


def _columns(
    texts: Sequence[str | None], others: Sequence[str | None], features: Sequence[Feature | Filter]
) -> tuple[list[str], list[str]]:
    """The columns of a table: those of text, and the others."""
    texts = [*texts, *(feature.column for feature in features if feature.kind != "number")]
    others = [*others, *(feature.column for feature in features if feature.kind == "number")]
    distinct = list(dict.fromkeys(column for column in texts if column is not None))
    return distinct, [column for column in dict.fromkeys(others) if column is not None and column not in distinct]


def _ids_are_text(files: Sequence[Path], column: str, columns: tuple[list[str], list[str]]) -> bool:
    """Whether ids are text: more than a hundredth of them are no whole number as it is usually written."""
    next(read_batches(files, *columns, 1), None)  # a file that lacks columns is refused with all their names
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
    return strange > 0.01 * total


# Rejects.


class _Rejects:
    """Writes the rows that cannot be used into a file, counts them, and says when they are too many."""

    def __init__(self, path: Path, accepted: float):
        self._path, self._accepted = path, accepted
        self._file: IO[str] | None = None
        self._table, self._begin = "", 0
        self._places: dict[str, int] = {}
        self._reasons: dict[str, collections.Counter[str]] = {}
        self._examples: dict[tuple[str, str], str] = {}

    def __enter__(self) -> _Rejects:
        if self._path.is_file():
            with open(self._path, errors="replace") as file:
                if not file.readline().startswith('{"file": '):
                    raise UsageError(f"--rejects={self._path}: is there and holds no rejects; choose another file")
            try:
                self._path.unlink()
            except OSError as error:
                raise CommandError(
                    f"--rejects={self._path}: the file of an earlier run cannot be removed: {error.strerror}"
                ) from None
        return self

    def __exit__(self, *unused: object) -> None:
        if self._file is not None:
            self._file.close()

    @property
    def total(self) -> int:
        """Rejects of all tables."""
        return sum(sum(reasons.values()) for reasons in self._reasons.values())

    def begin(self, table: str, files: Sequence[Path]) -> None:
        """What follows is of this table."""
        self._table, self._places = table, {str(path): i for i, path in enumerate(files)}
        self._begin = self._file.tell() if self._file else 0
        self._reasons[table] = collections.Counter()

    def add(self, source: Source, rejects: pa.RecordBatch) -> None:
        """Takes what encode.py rejects of a batch: row int64, reason, value."""
        rows, reasons, values = (rejects[name].to_pylist() for name in ("row", "reason", "value"))
        for row, reason, value in zip(rows, reasons, values, strict=True):
            self._count(source.path, source.first_row + row, reason, value)
            self._write(self._line(source.path, source.first_row + row, reason, value))

    def merge(self, rejects: Iterator[tuple[Path, int, str, str]]) -> None:
        """Takes rejects (file, row from 0 on, reason, value) of the whole table, in its order."""
        first = next(rejects, None)
        if first is None:
            return
        lines = []
        for path, row, reason, value in itertools.chain([first], rejects):
            self._count(path, row, reason, value)
            lines.append(self._line(path, row, reason, value))
        before: list[str] = []
        if self._file is not None:
            self._file.close()
            with open(self._path, encoding="utf-8") as file:
                file.seek(self._begin)
                before = file.readlines()
            os.truncate(self._path, self._begin)
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115
        for line in heapq.merge(before, lines, key=self._place):
            self._write(line)

    def check(self, rows: int, complete: bool) -> None:
        """Raises CommandError if too many of the `rows` of this table so far, or in all, were rejected."""
        reasons = self._reasons[self._table]
        rejected = sum(reasons.values())
        if self._file is not None:
            self._file.flush()
        if rejected <= self._accepted * rows or not (complete or rejected > _HOPELESS):
            return
        raise CommandError(
            f"{next(iter(self._places))}: {rejected:,} of {rows:,} {self._table} cannot be used "
            f"({self._summary(self._table)}), more than --max_reject_fraction={self._accepted:g}; "
            f"all are listed in {self._path}; correct the tables or the schema"
        )

    def report(self) -> None:
        """Says what was left out."""
        for table, reasons in self._reasons.items():
            if reasons:
                print(f"left out {sum(reasons.values()):,} {table} ({self._summary(table)}); see {self._path}")

    def _summary(self, table: str) -> str:
        return "; ".join(
            f"{count:,} rows: {reason}, first {self._examples[table, reason]}"
            for reason, count in self._reasons[table].items()
        )

    def _count(self, path: Path, row: int, reason: str, value: str | None) -> None:
        self._reasons[self._table][reason] += 1
        self._examples.setdefault((self._table, reason), f"{path.name} row {row + 1}: {value!r}")

    def _line(self, path: Path, row: int, reason: str, value: str | None) -> str:
        line = {"file": str(path), "row": row + 1, "table": self._table, "reason": reason, "value": value}
        return json.dumps(line, ensure_ascii=False) + "\n"

    def _place(self, line: str) -> tuple[int, int]:
        reject = json.loads(line)
        return self._places[reject["file"]], reject["row"]

    def _write(self, line: str) -> None:
        if self._file is None:
            try:
                self._file = open(self._path, "w", encoding="utf-8")  # noqa: SIM115
            except OSError as error:
                raise CommandError(f"--rejects={self._path}: cannot be written: {error.strerror}") from None
        self._file.write(line)


# The command's surroundings.

_CONVERTED = "converted"


def _converted(adapter: Adapter, source: Path, out: Path) -> Path:
    """Where the tables of an adapter's schema are: in `source`, or where its converter, if it has one, wrote them."""
    if adapter.convert is None:
        return source
    folder = out / _CONVERTED
    folder.mkdir()
    with _explained(out, 0):
        adapter.convert(source, folder)
    return folder


def _memory(text: str) -> int:
    """Bytes of "256MB". Raises UsageError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]i?B)", text)
    units = {"K": 1, "M": 2, "G": 3, "T": 4}
    size = int(float(match[1]) * (1024 if "i" in match[2] else 1000) ** units[match[2][0]]) if match else 0
    if not 64 * 10**6 <= size < 2**60:
        raise UsageError(f"--memory={text}: expected 64MB or more, as in 256MB or 4GB")
    return size


@contextmanager
def terminable() -> Iterator[list[int]]:
    """Inside, SIGTERM ends the command as Ctrl-C does: it cleans up. Gives the signals that came, for `heeded`."""
    received: list[int] = []

    def end(number: int, _: object) -> None:
        received.append(number)
        _end(number)

    heard = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN]  # as under nohup
    before = {number: signal.signal(number, end) for number in heard}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def heeded(signals: Sequence[int]) -> Iterator[None]:
    """Ends with the first of the signals that came inside, also where a library took the exception for its own.

    A signal that meets DuckDB while it reads a Python object comes back as duckdb.InvalidInputException, or not at all.
    """
    try:
        yield
    except BaseException:
        if signals:
            _end(signals[0])
        raise
    if signals:
        _end(signals[0])


def _end(number: int) -> NoReturn:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)


@contextmanager
def _explained(out: Path, memory: int) -> Iterator[None]:
    """Turns a full disk or too little memory into a CommandError."""
    try:
        yield
    except (OSError, duckdb.Error) as error:  # a result that is read through Arrow fails with OSError
        text = str(error)
        full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if (
            getattr(error, "errno", None) in full
            or any(os.strerror(number) in text for number in full)
            or "max_temp_directory_size" in text
        ):
            raise CommandError(
                f"{out.parent}: the disk is full ({text.splitlines()[0]}); make room, or choose an --out elsewhere"
            ) from None
        if "Out of Memory Error" in text:
            raise CommandError(
                f"--memory={memory / 10**6:.0f}MB does not suffice ({text.splitlines()[0]}); give more"
            ) from None
        raise
