"""`dpsr ingest`: turns raw tables into a store."""

from __future__ import annotations

import bisect
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from absl import flags
from tqdm import tqdm

from dpsr_common.errors import CommandError, UsageError, resource_error
from dpsr_common.packed_file import PackedFile
from dpsr_common.typed_config import to_dict
from dpsr_tf import spark
from dpsr_tf.data import spark_ingest
from dpsr_tf.data.adapters import Adapter, open_adapter
from dpsr_tf.data.assemble import Assembler
from dpsr_tf.data.code_book import CodeBook
from dpsr_tf.data.encode import (
    Encoded,
    IdIndex,
    are_text,
    columns_to_read,
    encode_interactions,
    encode_items,
    encode_users,
)
from dpsr_tf.data.interruption import end_on_signal, record_signals
from dpsr_tf.data.log_parts import KeptLog
from dpsr_tf.data.parallel import Workers
from dpsr_tf.data.pieces import Job, check_schema
from dpsr_tf.data.rejects import Rejects
from dpsr_tf.data.schema import Schema, load_schema
from dpsr_tf.data.store import (
    FORMAT,
    FORMAT_VERSION,
    Counts,
    Features,
    Store,
    file_names,
    interactions_names,
    manifest_checksum,
    new_directory,
)
from dpsr_tf.data.tables import Source, count_ids, find_files, read_batches

USAGE = """
Usage: dpsr ingest --schema=FILE --out=STORE
       dpsr ingest --adapter=NAME --input=DIR --out=STORE
       dpsr ingest --schema=FILE --items_only --like=MODEL --out=STORE
       dpsr ingest --schema=FILE --append=OLD_STORE --out=STORE
       dpsr ingest --schema=FILE --shards=N --engine=spark --out=STORE

Turns raw tables of items, users and interactions into a store, the input of `dpsr train`. Tables are Parquet, Arrow,
CSV, TSV or JSON lines files; the last three may be compressed (.gz, .zst).

A schema file (YAML) says what each column means. An adapter is a ready schema for a public data set.

A model reads only stores whose token ids and feature codes are its own. --like=MODEL makes such a store of new tables,
so that `dpsr index` can embed new items with a model that is already there. --append adds a day to the log of another
store without reading its old days again.

Rows that cannot be used are left out. A file beside the store lists them, each with the reason.

With --engine=spark, a cluster of Apache Spark does the work, and the store is the same, byte for byte (docs/spark.md).
"""

REQUIRED_FLAGS = ("out",)

# Rows that are encoded at a time.
_BATCH_ROWS = 1 << 16


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of `dpsr ingest`."""
    flags.DEFINE_string("schema", None, "schema file (YAML) that describes the tables", flag_values=values)
    flags.DEFINE_string("adapter", None, "name of a ready schema for a public data set", flag_values=values)
    flags.DEFINE_string(
        "input",
        None,
        "directory that file names in the schema are relative to; default: the directory of the schema file",
        flag_values=values,
    )
    flags.DEFINE_string("out", None, "directory of the new store", flag_values=values)
    flags.DEFINE_boolean("overwrite", False, "replace the store if --out exists already", flag_values=values)
    flags.DEFINE_boolean(
        "items_only", False, "read only the items, not the users and interactions of the schema", flag_values=values
    )
    flags.DEFINE_string(
        "like",
        None,
        "model whose token ids and feature codes the store takes over; tokens and values that the model does not know "
        "count as unknown",
        flag_values=values,
    )
    flags.DEFINE_boolean(
        "keep_log", False, "keep the interactions in the store, so that --append can add to them", flag_values=values
    )
    flags.DEFINE_string(
        "append",
        None,
        "store, made with --keep_log or --append, whose interactions come before those of the schema's files; items "
        "and users are read anew",
        flag_values=values,
    )
    flags.DEFINE_float(
        "keep_days",
        None,
        "with --append: leave out that store's interactions that are more than this many days older than the newest",
        0,
        flag_values=values,
    )
    flags.DEFINE_float(
        "max_reject_fraction",
        0.01,
        "largest share of a table's rows that may be unusable (0 to 1); more of them stop the job",
        flag_values=values,
    )
    flags.DEFINE_string(
        "rejects", None, "file that lists the unusable rows; default: OUT.rejects.jsonl", flag_values=values
    )
    flags.DEFINE_integer(
        "shards",
        1,
        "number of interaction files; all interactions of a query are in the same file",
        flag_values=values,
    )
    flags.DEFINE_integer("threads", 0, "number of threads; 0 uses all cores", flag_values=values)
    flags.DEFINE_string(
        "memory",
        "256MB",
        "memory for sorting and joining, such as 256MB or 4GB; data that do not fit wait on disk beside --out",
        flag_values=values,
    )
    spark.define_flags(values, "reads, sorts and encodes the rows")


def run(values: flags.FlagValues, arguments: list[str]) -> None:
    """Runs `dpsr ingest`."""
    memory = _check_flags(values)
    adapter = open_adapter(values.adapter) if values.adapter else None
    schema_path = adapter.schema_path if adapter else Path(values.schema)
    schema = load_schema(schema_path)
    if values.items_only:
        schema = dataclasses.replace(schema, interactions=None, ranking=None)
    if values.engine == "spark":
        check_schema(schema)
    codes = CodeBook.read(values.like) if values.like else None
    log = _kept_log(values, schema)
    base = Path(values.input) if values.input else schema_path.parent
    out = Path(values.out)
    rejects = Path(values.rejects) if values.rejects else _rejects_path(out.resolve())
    with (
        record_signals() as signals,
        new_directory(out, values.overwrite, "store", "manifest.json") as temporary,
        end_on_signal(signals),
        spark.session_of_flags(values, "dpsr ingest") as session,
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
            codes=codes,
            log=log,
            session=session,
        )
        shutil.rmtree(temporary / _CONVERTED, ignore_errors=True)
    print(
        f"store {values.out}: {counts.items:,} items, {counts.users:,} users, {counts.queries:,} queries, "
        f"{counts.positives:,} positive pairs, {counts.negatives:,} supervised negatives, "
        f"{counts.impressions:,} unclicked impressions, {counts.held_out:,} pairs held out"
    )


def _check_flags(values: flags.FlagValues) -> int:
    """Returns the bytes of --memory. Raises UsageError for a flag that is not allowed."""
    if bool(values.schema) == bool(values.adapter):
        given = "both --schema and --adapter are given" if values.schema else "neither --schema nor --adapter is given"
        raise UsageError(f"{given}: give either --schema=FILE or --adapter=NAME")
    if values.adapter is not None and values.input is None:
        raise UsageError(f"--adapter={values.adapter} needs --input, the directory of the downloaded files")
    if not 0 <= values.max_reject_fraction <= 1:
        raise UsageError(f"--max_reject_fraction={values.max_reject_fraction:g}: expected a number from 0 to 1")
    if not 1 <= values.shards <= 99_999:
        raise UsageError(f"--shards={values.shards}: expected 1 to 99999")
    if values.items_only and (values.append or values.keep_log):
        other = "--append" if values.append else "--keep_log"
        raise UsageError(f"{other}: cannot be combined with --items_only, which reads no interactions")
    if values.keep_days is not None and not values.append:
        raise UsageError(f"--keep_days={values.keep_days:g}: needs --append, the store whose old days are left out")
    if not 0 <= values.threads <= 1024:
        raise UsageError(f"--threads={values.threads}: expected 0 to 1024")
    if values.engine == "spark":
        for name in ("append", "keep_log"):
            if values[name].value:
                raise UsageError(f"--engine=spark: cannot be combined with --{name}; leave one of them out")
        if values.threads:
            raise UsageError("--threads: cannot be combined with --engine=spark, whose cluster has its own setting")
    return _memory(values.memory)


def _kept_log(values: flags.FlagValues, schema: Schema) -> KeptLog | None:
    """Returns the log that --append and --keep_log ask for. Raises CommandError if it cannot be kept or appended to."""
    if not values.append and not values.keep_log:
        return None
    flag = f"--append={values.append}" if values.append else "--keep_log"
    if schema.interactions is None:
        raise CommandError(f"{flag}: needs the section interactions, which the schema does not have; add it")
    if values.keep_days is not None and not schema.interactions.time:
        raise CommandError(
            f"--keep_days={values.keep_days:g}: the schema names no column with the time of interactions; "
            f"name it with `time`, or leave --keep_days out"
        )
    return KeptLog(Store(values.append) if values.append else None, schema.interactions, values.keep_days)


def _memory(text: str) -> int:
    """Returns the bytes of a size such as "256MB". Raises UsageError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]i?B)", text)
    units = {"K": 1, "M": 2, "G": 3, "T": 4}
    size = int(float(match[1]) * (1024 if "i" in match[2] else 1000) ** units[match[2][0]]) if match else 0
    if not 64 * 10**6 <= size < 2**60:
        raise UsageError(f"--memory={text}: expected 64MB or more, as in 256MB or 4GB")
    return size


def _rejects_path(out: Path) -> Path:
    return out.with_name(f"{out.name}.rejects.jsonl")


_CONVERTED = "converted"


def _converted(adapter: Adapter, source: Path, out: Path) -> Path:
    """Returns the directory of an adapter's tables: `source`, or a folder of `out` that its converter has filled."""
    if adapter.convert is None:
        return source
    folder = out / _CONVERTED
    folder.mkdir()
    with _resource_errors(out, 0):
        adapter.convert(source, folder)
    return folder


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
    codes: CodeBook | None = None,
    log: KeptLog | None = None,
    session: Any = None,
) -> Counts:
    """Writes the files of a store into the directory `out`, the manifest last.

    The same rows give the same store, byte for byte, in whatever order and files they come, and with every number of
    threads, memory and batch size. The exception are items or users with the same id: the first row is kept.

    Args:
        schema: describes the columns.
        base: directory that the schema's files are relative to.
        out: an existing, empty directory.
        max_reject_fraction: share of the items, of the users and of the interactions that may be unusable. These rows
            are left out.
        rejects: file for the unusable rows, in the order of the input; OUT.rejects.jsonl if None. Each line is a JSON
            object with file, row (from 1 on), table, reason and value. Without such rows there is no file.
        shards: number of interaction files.
        threads: number of threads; 0 is one per core.
        memory: bytes for sorting, joining and counting. The process takes this, some 300 MB for itself, and some 20
            bytes for each item and user.
        batch_rows: rows that are encoded at a time.
        codes: token ids and feature codes of a model, which the store takes over.
        log: keeps the interactions in the store, after those of an earlier one; None keeps nothing.
        session: a SparkSession that does the work; None is this machine. Each of its tasks takes `memory`. `threads` is
            not used, `log` must be None, and pieces.check_schema says which schemas it can make.

    Returns:
        The counts of the manifest.

    Raises:
        CommandError: a file cannot be read, too many rows cannot be used, the rows do not give a store, or disk or
            memory do not suffice. The message names file and column, or the flag.
    """
    threads = threads or os.cpu_count() or 1
    if codes:
        codes.check(schema)
    files = {
        "items": find_files(schema.items.files, base),
        # Without interactions, nothing refers to a user.
        "users": find_files(schema.users.files, base) if schema.users and schema.interactions else [],
        "interactions": find_files(schema.interactions.files, base) if schema.interactions else [],
    }
    more: dict[str, Any] = {}
    sections: dict[str, Any] = {}
    with _resource_errors(out, memory), Rejects(rejects or _rejects_path(out), max_reject_fraction) as rejected:
        if session is not None:
            job = Job(schema, out.resolve(), shards, memory, batch_rows, codes.path.resolve() if codes else None)
            counts, features = spark_ingest.write_store(session, job, files, rejected)
        else:
            with Workers(threads) as workers, Assembler(schema, out, workers, memory, codes, log) as store:
                _read_tables(schema, files, _TableReader(store, workers, batch_rows, rejected))
                counts, features, sections = store.write(shards)
        counts = dataclasses.replace(counts, rejected=rejected.total)
        if log:
            more["log"] = log.parts()
        if codes:
            more["like"] = str(codes.path)
        more |= sections
        _write_manifest(out, schema, shards, counts, features, more)
        rejected.report()
    return counts


def _write_manifest(
    out: Path, schema: Schema, shards: int, counts: Counts, features: Features, more: dict[str, Any]
) -> None:
    written_schema = to_dict(schema)
    for section in ("ranking", "graph", "rewriting"):
        if written_schema[section] is None:
            # The manifest is then that of a version without this section, which can read the store.
            del written_schema[section]
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "counts": dataclasses.asdict(counts),
        "shards": shards,
        # So a worker knows the row of a query without the files of the other workers.
        "shard_queries": [
            len(PackedFile(out / name, verify=False)["query.splits"]) - 1 for name in interactions_names(shards)
        ],
        "files": {
            name: f"{PackedFile(out / name, verify=False).fingerprint:016x}" for name in file_names(schema, shards)
        },
        "features": {
            table: [{key: value for key, value in feature.items() if value not in (None, [])} for feature in stored]
            for table, stored in to_dict(features).items()
        },
        "schema": written_schema,
        **more,
    }
    manifest["checksum"] = manifest_checksum(manifest)
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


# Reading.


def _read_tables(schema: Schema, files: dict[str, list[Path]], reader: _TableReader) -> None:
    """Reads items, users and interactions, in this order: interactions refer to the rows of the other two."""
    text_items = _read_items(schema, files["items"], reader)
    text_users = _read_users(schema, files["users"], reader)
    s = schema.interactions
    if s is None:
        return
    items, users = IdIndex(reader.store.ids("items")), IdIndex(reader.store.ids("users")) if s.user else None
    reader.read(
        "interactions",
        files["interactions"],
        *columns_to_read(schema, "interactions"),
        lambda batch: encode_interactions(batch, s, items, users, text_items, text_users),
    )


def _read_items(schema: Schema, files: Sequence[Path], reader: _TableReader) -> bool:
    """Reads the items. Returns whether their ids are text."""
    s = schema.items
    columns = columns_to_read(schema, "items")
    text_ids = _ids_are_text(files, s.id, columns)
    reader.read("items", files, *columns, lambda batch: encode_items(batch, s, text_ids))
    if len(reader.store.ids("items")) == 0:
        raise CommandError(f"{files[0]}: has no usable row, expected at least one item")
    return text_ids


def _read_users(schema: Schema, files: Sequence[Path], reader: _TableReader) -> bool:
    """Reads the users, if there are any. Returns whether their ids are text."""
    s = schema.users
    if s is None or not files:
        reader.store.close_table("users")
        return False
    columns = columns_to_read(schema, "users")
    text_ids = _ids_are_text(files, s.id, columns)
    reader.read("users", files, *columns, lambda batch: encode_users(batch, s, text_ids))
    return text_ids


def _ids_are_text(files: Sequence[Path], column: str, columns: tuple[list[str], list[str]]) -> bool:
    """Whether ids are text."""
    # A file that lacks columns is refused here, with the names of all of them.
    next(read_batches(files, *columns, 1), None)
    return are_text(count_ids(files, column))


class _TableReader:
    """Reads tables, encodes their rows on all threads, and hands them to the assembler or to the rejects."""

    def __init__(self, store: Assembler, workers: Workers, batch_rows: int, rejects: Rejects):
        self.store = store
        self._workers, self._batch_rows, self._rejects = workers, batch_rows, rejects

    def read(
        self,
        table: str,
        files: Sequence[Path],
        texts: Sequence[str],
        others: Sequence[str],
        encode: Callable[[pa.RecordBatch], Encoded],
    ) -> None:
        """Reads a whole table. Raises CommandError if more rows than allowed cannot be used."""
        self._rejects.begin(table, files)
        has_ids = table != "interactions"
        inputs = _InputRows()

        def encoded(source: Source) -> tuple[Source, Encoded]:
            return source, encode(source.batch)

        batches = read_batches(files, texts, others, self._batch_rows)
        with tqdm(desc=f"{'read ' + table:<16}", unit=" rows", unit_scale=True) as bar:
            for source, result in self._workers.map(encoded, batches):
                rows = source.batch.num_rows
                self._rejects.add(source, result.rejects)
                numbers = None
                if has_ids:
                    bad = np.unique(result.rejects["row"].to_numpy())
                    numbers = np.delete(np.arange(inputs.count, inputs.count + rows), bad)
                self.store.add(table, result.rows, numbers)
                inputs.add(source)
                self._rejects.check(inputs.count, complete=False)
                bar.update(rows)
        if has_ids:
            repeated, values = self.store.close_table(table)
            reason = f"{table[:-1]} id appears more than once"
            self._rejects.merge(
                (*inputs.place(int(number)), reason, value) for number, value in zip(repeated, values, strict=True)
            )
        self._rejects.check(inputs.count, complete=True)


class _InputRows:
    """Numbers the rows of all files of a table, and finds file and row of a number."""

    def __init__(self) -> None:
        self.count = 0
        self._starts: list[int] = []
        self._sources: list[tuple[Path, int]] = []

    def add(self, source: Source) -> None:
        """Adds the rows of the next batch."""
        self._starts.append(self.count)
        self._sources.append((source.path, source.first_row - self.count))
        self.count += source.batch.num_rows

    def place(self, number: int) -> tuple[Path, int]:
        """Returns the file of a row, and the row's number in it, from 0."""
        path, offset = self._sources[bisect.bisect_right(self._starts, number) - 1]
        return path, number + offset


@contextmanager
def _resource_errors(out: Path, memory: int) -> Iterator[None]:
    """Turns the errors of a full disk, other missing resources and too little memory into a CommandError."""
    try:
        yield
    except (OSError, duckdb.Error) as error:
        # A DuckDB result that is read through Arrow fails with an OSError, whose text has the reason.
        text = str(error)
        lacking = resource_error(error, out.parent)
        if lacking is not None:
            try:
                raise lacking from None
            finally:
                del lacking  # else the error would hold this frame, and with it the open files of the database
        if "max_temp_directory_size" in text:
            raise CommandError(
                f"{out.parent}: the disk is full ({text.splitlines()[0]}); make room, or choose an --out elsewhere"
            ) from None
        if "Out of Memory Error" in text:
            raise CommandError(
                f"--memory={memory / 10**6:.0f}MB is not enough ({text.splitlines()[0]}); give more"
            ) from None
        raise
