"""A store in pieces: what the tasks of a cluster engine do for `dpsr ingest`, and how the driver joins their results.

spark.py runs these functions. They know nothing of Spark: each is a function of files in a folder that all machines
see, and writes files there that appear whole or not at all, so that a task may run twice.

The rows of items and users go by ranges of ids into pieces, the rows of the log by the hash of the query into the
shards of the store. A piece or shard is small enough for one task, which sorts and joins it in a database of its own.
What depends on the whole table is counted first (count_piece, count_shard), then merged (the driver), then used
(write_piece, write_shard).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from dpsr_common.errors import CommandError
from dpsr_common.files import replaced
from dpsr_common.packed_file import PackedFile, PackedFileWriter
from dpsr_tf.data.assemble import Assembler, coded_columns, plain_names, tokenizer_config, write_vocabulary
from dpsr_tf.data.code_book import CodeBook
from dpsr_tf.data.column_files import row_splits
from dpsr_tf.data.database import TEXT_ROWS, Database
from dpsr_tf.data.encode import (
    Encoded,
    IdIndex,
    columns_to_read,
    encode_interactions,
    encode_items,
    encode_users,
)
from dpsr_tf.data.feature_table import BYTE_VALUES, known_values, most_frequent
from dpsr_tf.data.id_index import id_index
from dpsr_tf.data.interaction_log import EVENT_SECTIONS, InteractionLog, used_rows
from dpsr_tf.data.parallel import Workers
from dpsr_tf.data.schema import VALUE_KINDS, Schema
from dpsr_tf.data.store import StoredFeature, interactions_names, vocabulary_name
from dpsr_tf.data.tables import read_batches
from dpsr_tokenizer import Vocabulary, VocabularyBuilder

# A row of the input is numbered by file and row, so that the first of two rows with the same id can be found.
_ROWS_OF_FILE = 1 << 40
_COPIED_ROWS = 1 << 22


@dataclasses.dataclass(frozen=True)
class Job:
    """What every task knows.

    Attributes:
        schema: describes the tables.
        out: the directory of the store; every machine sees it under this path.
        shards: number of interaction files.
        memory: bytes that a task takes for sorting and counting.
        batch_rows: rows that are encoded at a time.
        like: a model whose token ids and feature codes the store takes over.
        text_ids: the tables, "items" or "users", whose ids are text.
    """

    schema: Schema
    out: Path
    shards: int
    memory: int
    batch_rows: int
    like: Path | None = None
    text_ids: frozenset[str] = frozenset()

    @property
    def work(self) -> Path:
        """The folder for everything that is not part of the store."""
        return self.out / "unfinished"

    @property
    def codes(self) -> CodeBook | None:
        """The codes of the model `like`."""
        return CodeBook.read(self.like) if self.like else None

    def piece(self, table: str, number: int) -> Path:
        """The folder of a piece."""
        return self.work / "pieces" / f"{table}-{number:05}"

    def shard(self, number: int) -> Path:
        """The folder of a shard."""
        return self.work / "shards" / f"{number:05}"


def check_schema(schema: Schema) -> None:
    """Raises CommandError if a store of this schema cannot be made in pieces."""
    log = schema.interactions
    parts = {
        "the section ranking": schema.ranking,
        "the section graph": schema.graph,
        "the section rewriting": schema.rewriting,
        "mined_negatives of the section interactions": log.mined_negatives if log else 0,
    }
    for name, given in parts.items():
        if given:
            raise CommandError(
                f"--engine=spark: the schema has {name}, which needs the whole log on one machine; leave it out of the "
                f"schema, or give --engine=local"
            )


# Reading. A task reads and encodes some files.


def encode_files(job: Job, table: str, files: Iterable[tuple[int, str]]) -> Iterator[pa.RecordBatch]:
    """Yields the usable rows of files as encoded_schema says, and writes what else is to know of each (file_report).

    Args:
        job: the job.
        table: "items", "users" or "interactions".
        files: number among the files of the table, and path.

    Raises:
        CommandError: a file cannot be read.
    """
    encode, schema = _encoder(job, table), encoded_schema(job, table)
    for number, path in files:
        rows, last_time = 0, 0
        rejects: list[pa.RecordBatch] = []
        for source in read_batches([Path(path)], *columns_to_read(job.schema, table), job.batch_rows):
            result = encode(source.batch)
            rows += source.batch.num_rows
            bad = result.rejects["row"].to_numpy()
            if len(bad):
                places = pa.array(bad + source.first_row)
                rejects.append(pa.record_batch({**_columns(result.rejects), "row": places}))
            batch = result.rows
            if table == "interactions":
                if batch.num_rows:
                    last_time = max(last_time, pc.max(batch["time"]).as_py())
                assert job.schema.interactions is not None
                batch = used_rows(batch, job.schema.interactions)
            else:
                begin = number * _ROWS_OF_FILE + source.first_row
                numbers = np.delete(np.arange(begin, begin + source.batch.num_rows), np.unique(bad))
                batch = batch.rename_columns(plain_names(batch.schema.names))
                batch = batch.append_column("number", pa.array(numbers, pa.int64()))
            yield _cast(batch, schema)
        _write_report(_report_path(job, table, number), rows, last_time, rejects)


def encoded_schema(job: Job, table: str) -> pa.Schema:
    """Returns the columns of encode_files. Numbers are signed and texts below 2 GiB a batch, as Spark wants them."""
    rows = _empty_rows(job, table)
    fields = [pa.field(name, _portable(kind)) for name, kind in zip(rows.names, rows.types, strict=True)]
    return pa.schema(fields if table == "interactions" else [*fields, pa.field("number", pa.int64())])


@dataclasses.dataclass(frozen=True)
class FileReport:
    """What is to know of a file that encode_files has read: its rows, its last time, and the unusable rows."""

    rows: int
    last_time: int
    rejects: pa.RecordBatch  # row in the file from 0, reason, value


def file_report(job: Job, table: str, number: int) -> FileReport:
    """Reads the report of a file of a table."""
    read = pyarrow.parquet.read_table(_report_path(job, table, number))
    metadata = json.loads(read.schema.metadata[b"dpsr"])
    batches = read.combine_chunks().to_batches()
    empty = pa.record_batch([pa.array([], kind) for kind in _REJECTS.types], names=_REJECTS.names)
    return FileReport(**metadata, rejects=batches[0] if batches else empty)


def place_of(number: int) -> tuple[int, int]:
    """Returns the number of the file and the row in it, from 0, of a row of the input."""
    return divmod(number, _ROWS_OF_FILE)


_REJECTS = pa.schema([("row", pa.int64()), ("reason", pa.large_string()), ("value", pa.large_string())])


def _report_path(job: Job, table: str, number: int) -> Path:
    return job.work / "reports" / f"{table}-{number:06}.parquet"


def _write_report(path: Path, rows: int, last_time: int, rejects: list[pa.RecordBatch]) -> None:
    metadata = {"dpsr": json.dumps({"rows": rows, "last_time": last_time})}
    table = pa.Table.from_batches([batch.cast(_REJECTS) for batch in rejects], _REJECTS)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as temporary:
        pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), temporary)


def _encoder(job: Job, table: str) -> Callable[[pa.RecordBatch], Encoded]:
    schema = job.schema
    if table == "items":
        return lambda batch: encode_items(batch, schema.items, table in job.text_ids)
    if table == "users":
        users = schema.users
        assert users is not None
        return lambda batch: encode_users(batch, users, table in job.text_ids)
    log = schema.interactions
    assert log is not None
    rows_of = {name: _id_index_of(job.work / f"{name}.npy") for name in ("items", "users")}
    return lambda batch: encode_interactions(
        batch,
        log,
        rows_of["items"],
        rows_of["users"] if log.user else None,
        "items" in job.text_ids,
        "users" in job.text_ids,
    )


@functools.lru_cache(maxsize=2)
def _id_index_of(path: Path) -> IdIndex:
    """Opens the ids of a table, which the tasks of a process share."""
    return IdIndex(np.load(path, mmap_mode="r"))


def _empty_rows(job: Job, table: str) -> pa.Schema:
    """Returns the columns in which the rows of a table wait in a database."""
    texts, others = columns_to_read(job.schema, table)
    nothing = pa.record_batch({name: pa.array([], pa.large_binary()) for name in [*texts, *others]})
    if table == "interactions":
        log, ids = job.schema.interactions, IdIndex(np.zeros(0, np.int64))
        assert log is not None
        text_ids = ("items" in job.text_ids, "users" in job.text_ids)
        return used_rows(encode_interactions(nothing, log, ids, ids, *text_ids).rows, log).schema
    rows = _encoder(job, table)(nothing).rows
    return rows.rename_columns(plain_names(rows.schema.names)).schema


def _portable(kind: pa.DataType) -> pa.DataType:
    t = pa.types
    if t.is_large_string(kind):
        return pa.string()
    if t.is_large_list(kind) or t.is_list(kind):
        return pa.list_(_portable(kind.value_type))
    signed = {pa.uint8(): pa.int16(), pa.uint16(): pa.int32(), pa.uint32(): pa.int64(), pa.uint64(): pa.int64()}
    return signed.get(kind, kind)


def _cast(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """Casts between the types of a database and those of Spark. A hash of 64 bits changes its sign only."""
    columns = [batch[field.name].cast(field.type, safe=False) for field in schema]
    return pa.record_batch(columns, schema)


def _columns(batch: pa.RecordBatch) -> dict[str, pa.Array]:
    return dict(zip(batch.schema.names, batch.columns, strict=True))


# Pieces of items and users.


@dataclasses.dataclass(frozen=True)
class Piece:
    """Some rows of items or users.

    Attributes:
        table: "items" or "users".
        number: its place among the pieces of the table. All ids of a piece are above those of the piece before it.
        file: a Parquet file with its rows, in no order; None is a piece without rows.
    """

    table: str
    number: int
    file: Path | None


def count_piece(job: Job, piece: Piece) -> list[tuple[int, str]]:
    """Counts tokens and values of a piece, and writes its ids, in the folder of the piece.

    Returns:
        The rows that repeat an id: their number and the id.

    Raises:
        CommandError: two text ids have the same hash.
    """
    with _new_folder(job.piece(piece.table, piece.number)) as folder, _assembler(job, folder) as store:
        numbers, ids = _add_piece(job, store, piece)
        np.save(folder / "ids.npy", store.ids(piece.table))
        for i in _counted_columns(job, piece.table):
            store.save_value_counts(piece.table, i, folder / f"values-{i}.parquet")
        for name in _counted_vocabularies(job):
            _write_counts(store.count_tokens(name), folder / vocabulary_name(name))
    return list(zip(numbers.tolist(), ids, strict=True))


def write_piece(job: Job, piece: Piece, first_row: int) -> tuple[StoredFeature, ...]:
    """Writes the packed files of a piece into the folder `files` of the piece. `first_row` is its first row."""
    with _new_folder(job.piece(piece.table, piece.number) / "files") as folder, _assembler(job, folder) as store:
        _add_piece(job, store, piece)
        values = [
            pyarrow.parquet.read_table(_values_path(job, piece.table, i))["value"].to_pylist()
            if column.kind in VALUE_KINDS
            else None
            for i, column in enumerate(coded_columns(job.schema, piece.table))
        ]
        vocabularies = {name: Vocabulary(job.out / vocabulary_name(name)) for name in _vocabulary_names(job)}
        if piece.table == "users":
            with PackedFileWriter(folder / "users.dpsr", "users") as file:
                return store.write_users(file, vocabularies, values)
        clicks = None
        if not job.schema.items.popularity:
            all_clicks = np.load(job.work / "clicks.npy", mmap_mode="r")
            clicks = np.array(all_clicks[first_row : first_row + len(store.ids("items"))])
        return store.write_items(vocabularies, clicks, values)


def _add_piece(job: Job, store: Assembler, piece: Piece) -> tuple[np.ndarray, list[str]]:
    if piece.file is not None:
        schema = _empty_rows(job, piece.table)
        with pyarrow.parquet.ParquetFile(piece.file) as file:
            for batch in file.iter_batches(job.batch_rows, use_threads=False):
                store.add(piece.table, _cast(batch, schema), batch["number"].to_numpy())
    return store.close_table(piece.table, piece.number == 0)


@contextlib.contextmanager
def _assembler(job: Job, folder: Path) -> Iterator[Assembler]:
    # Without interactions, whose rows are in the shards.
    schema = dataclasses.replace(job.schema, interactions=None)
    with (
        tempfile.TemporaryDirectory(dir=_local_folder()) as local,
        Workers(1) as workers,
        Assembler(schema, folder, workers, job.memory, job.codes, folder=Path(local) / "rows") as store,
    ):
        yield store


def _vocabulary_names(job: Job) -> list[str | None]:
    return [None, *job.schema.vocabularies]


def _counted_vocabularies(job: Job) -> list[str | None]:
    codes = job.codes
    return [name for name in _vocabulary_names(job) if codes is None or codes.vocabulary(name) is None]


def _counted_columns(job: Job, table: str) -> list[int]:
    codes = job.codes
    return [
        i
        for i, column in enumerate(coded_columns(job.schema, table))
        if column.kind in VALUE_KINDS and known_values(codes, table, column) is None
    ]


def _builder(job: Job, name: str | None, database: Database) -> VocabularyBuilder:
    return VocabularyBuilder(
        tokenizer_config(job.schema, name),
        num_threads=1,
        max_memory_bytes=job.memory,
        temporary_directory=database.folder,
    )


def _write_counts(builder: VocabularyBuilder, path: Path) -> None:
    # A vocabulary has an id at least. Without tokens, it is this bucket.
    builder.write(path, num_oov_buckets=1)


# Shards of the log.


@dataclasses.dataclass(frozen=True)
class ShardCounts:
    """What the whole log must know of a shard.

    Attributes:
        queries: the number of its queries.
        positives: the number of its positive pairs for training.
        few_values: see InteractionLog.few_values.
    """

    queries: int
    positives: int
    few_values: dict[str, np.ndarray | None]


def count_shard(job: Job, number: int, files: Sequence[Path], last_time: int) -> ShardCounts:
    """Numbers the queries of a shard and counts its tokens and clicks, in the folder of the shard.

    Args:
        job: the job.
        number: the shard.
        files: Parquet files with its rows.
        last_time: the time of the last row of the whole log.
    """
    with _new_folder(job.shard(number)) as folder, _database(job) as (database, log):
        log.last_time = last_time
        if job.schema.interactions is not None:
            schema = _empty_rows(job, "interactions")
            log.add_used(pa.record_batch([pa.array([], kind) for kind in schema.types], schema=schema))
            for path in files:
                with pyarrow.parquet.ParquetFile(path) as file:
                    for batch in file.iter_batches(job.batch_rows, use_threads=False):
                        log.add_used(_cast(batch, schema))
        log.number_queries(job.shards)
        log.save(folder)
        log.save_clicks(folder / "clicks.parquet")
        if None in _counted_vocabularies(job):
            builder = _builder(job, None, database)
            for batch in database.batches("SELECT text FROM queries WHERE training", "count queries", rows=TEXT_ROWS):
                builder.add(batch.column(0))
            _write_counts(builder, folder / vocabulary_name())
        few_values = log.few_values()
        return ShardCounts(database.count("queries"), log.count_positives(), few_values)


def write_shard(
    job: Job, number: int, first_query: int, few_values: dict[str, np.ndarray | None]
) -> tuple[dict[str, int], int]:
    """Writes the interaction file of a shard into the store, and its events and held-out pairs into its folder.

    Args:
        job: the job.
        number: the shard.
        first_query: the number of its first query among those of all shards.
        few_values: see InteractionLog.few_values, for the whole log.

    Returns:
        The counts of queries and pairs, and the number of held-out pairs.
    """
    with _new_folder(job.shard(number) / "files") as folder, _database(job) as (_, log):
        log.load(job.shard(number))
        log.save_events(folder / "events.parquet", first_query)
        vocabulary = Vocabulary(job.out / vocabulary_name())
        counts = log.write_interactions(folder, job.shards, vocabulary, number, few_values)
        held_out = log.write_held_out(folder)
        name = interactions_names(job.shards)[number]
        os.replace(folder / name, job.out / name)
    return counts, held_out


@contextlib.contextmanager
def _database(job: Job) -> Iterator[tuple[Database, InteractionLog]]:
    with tempfile.TemporaryDirectory(dir=_local_folder()) as local, Workers(1) as workers:
        database = Database(Path(local), workers, job.memory)
        try:
            yield database, InteractionLog(job.schema.interactions, database, is_shard=True)
        finally:
            database.close()


# Joining, on the driver.


def join_ids(job: Job, pieces: Sequence[Piece]) -> np.ndarray:
    """Writes the ids of all pieces of a table where encode_files looks for them. Returns where each piece begins."""
    parts = [np.load(job.piece(piece.table, piece.number) / "ids.npy") for piece in pieces]
    np.save(job.work / f"{pieces[0].table}.npy", np.concatenate(parts))
    return row_splits(np.array([len(part) for part in parts]))


def join_clicks(job: Job, num_items: int) -> None:
    """Adds the clicks of each item over all shards, for write_piece."""
    clicks = np.zeros(num_items, np.int64)
    for shard in range(job.shards):
        counts = pyarrow.parquet.read_table(job.shard(shard) / "clicks.parquet")
        # A shard names an item once.
        clicks[counts["item_row"].to_numpy()] += counts["n"].to_numpy()
    np.save(job.work / "clicks.npy", clicks.astype(np.float32))


def join_counts(job: Job, pieces: Sequence[Piece]) -> None:
    """Merges the counts of tokens and values: writes the vocabularies of the store, and the values for write_piece.

    Raises:
        CommandError: a vocabulary is empty.
    """
    codes = job.codes
    with _database(job) as (database, _):
        for name in _vocabulary_names(job):
            write_vocabulary(job.schema, name, job.out, codes, functools.partial(_merged, job, pieces, name, database))
        for table in ("items", "users"):
            counted = _counted_columns(job, table)
            for i, column in enumerate(coded_columns(job.schema, table)):
                if column.kind not in VALUE_KINDS:
                    continue
                path = _values_path(job, table, i)
                path.parent.mkdir(exist_ok=True)
                if i not in counted:
                    values = pa.array(known_values(codes, table, column), pa.large_string())
                    pyarrow.parquet.write_table(pa.table({"value": values}), path)
                    continue
                folders = [job.piece(table, piece.number) for piece in pieces if piece.table == table]
                database.load("parts", *(folder / f"values-{i}.parquet" for folder in folders))
                sums = "(SELECT value, sum(n) AS n FROM parts GROUP BY value)"
                rows = database.table(f"SELECT value FROM ({most_frequent(sums, column)}) ORDER BY n DESC, value")
                pyarrow.parquet.write_table(rows, path)
                database.drop("parts")


def _merged(job: Job, pieces: Sequence[Piece], name: str | None, database: Database) -> VocabularyBuilder:
    builder = _builder(job, name, database)
    folders = [job.piece(piece.table, piece.number) for piece in pieces]
    if name is None:
        folders += [job.shard(shard) for shard in range(job.shards)]
    for folder in folders:
        builder.add_counts(Vocabulary(folder / vocabulary_name(name)))
    return builder


def join_few_values(shards: Sequence[ShardCounts]) -> dict[str, np.ndarray | None]:
    """Returns what InteractionLog.few_values says about all shards together."""
    joined: dict[str, np.ndarray | None] = {}
    for name in shards[0].few_values:
        parts = [shard.few_values[name] for shard in shards]
        known = [part for part in parts if part is not None]
        values = np.unique(np.concatenate(known)) if len(known) == len(parts) else None
        joined[name] = values if values is not None and len(values) <= BYTE_VALUES else None
    return joined


def join_tables(job: Job, pieces: Sequence[Piece], events: Sequence[Path]) -> int:
    """Writes the files of items and users. Returns the number of events.

    Args:
        job: the job.
        pieces: the pieces of both tables, in order.
        events: Parquet files with the events of all users; one after the other they are sorted by EVENT_ORDER.
    """
    folders = {
        table: [job.piece(table, piece.number) / "files" for piece in pieces if piece.table == table]
        for table in ("items", "users")
    }
    names = ["items.dpsr", "titles.dpsr", *(["filters.dpsr"] if job.schema.items.filters else [])]
    for name in names:
        with PackedFileWriter(job.out / name, name.removesuffix(".dpsr")) as file:
            _join(file, [folder / name for folder in folders["items"]], _index(job, "items"))
    with PackedFileWriter(job.out / "users.dpsr", "users") as file:
        index = _index(job, "users")
        _join(file, [folder / "users.dpsr" for folder in folders["users"]], index)
        return _write_events(file, events, len(index["id_index.rows"]))


def join_held_out(job: Job, first_queries: np.ndarray) -> None:
    """Writes the held-out pairs of all shards, whose queries begin at `first_queries`, int64 [shards + 1]."""
    paths = [job.shard(shard) / "files" / "held_out.dpsr" for shard in range(job.shards)]
    with PackedFileWriter(job.out / "held_out.dpsr", "held_out") as file:
        files = [PackedFile(path) for path in paths]
        for name in files[0]:
            parts = (part[name] for part in files)
            if name == "query":
                parts = (part + np.int32(first) for part, first in zip(parts, first_queries, strict=False))
            _append(file, name, parts, files[0][name].dtype)


def _index(job: Job, table: str) -> dict[str, np.ndarray]:
    splits, rows = id_index(np.load(job.work / f"{table}.npy", mmap_mode="r"))
    return {"id_index.splits": splits, "id_index.rows": rows}


def _join(file: PackedFileWriter, paths: Sequence[Path], own: Mapping[str, np.ndarray]) -> None:
    """Writes the rows of several packed files as one file; the sections `own` are given."""
    files = [PackedFile(path) for path in paths]
    for name, first in files[0].items():
        if name in own:
            file.add(name, own[name])
        elif name.startswith("values."):
            # All pieces have the values of the whole table.
            file.add(name, first)
        elif name.endswith(".splits") and first.dtype == np.int64:
            _append(file, name, _joined_splits([part[name] for part in files]), first.dtype)
        else:
            _append(file, name, (part[name] for part in files), first.dtype)


def _joined_splits(parts: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    yield np.zeros(1, np.int64)
    end = 0
    for part in parts:
        yield part[1:] + end
        end += int(part[-1])


def _append(file: PackedFileWriter, name: str, parts: Iterable[np.ndarray], dtype: Any) -> None:
    empty = True
    for part in parts:
        for begin in range(0, len(part), _COPIED_ROWS):
            file.append(name, np.ascontiguousarray(part[begin : begin + _COPIED_ROWS], dtype))
            empty = False
    if empty:
        file.add(name, np.zeros(0, dtype))


def _write_events(file: PackedFileWriter, paths: Sequence[Path], num_users: int) -> int:
    counts = np.zeros(num_users, np.int64)
    for (users,) in _event_columns(paths, ["user_row"]):
        rows, found = np.unique(users, return_counts=True)
        counts[rows] += found
    file.add("event.splits", row_splits(counts))
    dtypes = {"event.time": np.uint32, "event.type": np.uint8}
    for section, column in EVENT_SECTIONS.items():
        parts = (values for (values,) in _event_columns(paths, [column]))
        _append(file, section, parts, dtypes.get(section, np.int32))
    return int(counts.sum())


def _event_columns(paths: Sequence[Path], names: list[str]) -> Iterator[list[np.ndarray]]:
    for path in paths:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(1 << 20, columns=names, use_threads=False):
                yield [batch[name].to_numpy() for name in names]


def _values_path(job: Job, table: str, i: int) -> Path:
    return job.work / "values" / f"{table}-{i}.parquet"


# Folders.


def _local_folder() -> str | None:
    """Returns the folder of this machine for temporary files that Spark was given; None is that of the system."""
    folders = os.environ.get("SPARK_LOCAL_DIRS") or os.environ.get("LOCAL_DIRS") or ""
    return next((folder for folder in folders.split(",") if os.path.isdir(folder)), None)


@contextlib.contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """Makes a folder that appears at `path` when the block ends. If another try of the task was first, that one stays.

    Raises:
        CommandError: the folder cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=path.parent))
    except OSError as error:
        raise CommandError(
            f"{path.parent}: cannot be written: {error.strerror}; give an --out that all machines can write"
        ) from None
    try:
        yield temporary
        try:
            os.rename(temporary, path)
        except OSError:
            if not path.is_dir():
                raise
            shutil.rmtree(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
