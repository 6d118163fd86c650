"""The steps of `dpsr ingest --engine=spark`, on the driver. pieces.py has what the tasks do."""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from dpsr_common.errors import CommandError
from dpsr_tf.data import pieces
from dpsr_tf.data.encode import are_text
from dpsr_tf.data.interaction_log import EVENT_ORDER, no_positive_pairs
from dpsr_tf.data.pieces import Job, Piece
from dpsr_tf.data.rejects import Rejects
from dpsr_tf.data.store import Counts, Features
from dpsr_tf.data.tables import Source, count_ids
from dpsr_tf.spark import run_tasks

# A piece of items or users has about so many rows.
_PIECE_ROWS = 1 << 20


def write_store(spark: Any, job: Job, files: dict[str, list[Path]], rejected: Rejects) -> tuple[Counts, Features]:
    """Writes the packed files of a store, all but the manifest, the same as Assembler does.

    Args:
        spark: a SparkSession. Its machines see the input files and job.out under the same paths.
        job: the job; its directory `out` is empty.
        files: the files of "items", "users" and "interactions".
        rejected: takes the rows that cannot be used.

    Raises:
        CommandError: as `ingest`.
    """
    job.work.mkdir()
    tables = {}
    for table in ("items", "users"):
        job, tables[table] = _read_table(spark, job, table, files[table], rejected)
    both = [*tables["items"], *tables["users"]]
    first_rows = {table: pieces.join_ids(job, tables[table]) for table in tables}
    num_items, num_users = (int(first_rows[table][-1]) for table in ("items", "users"))
    shards = _read_log(spark, job, files["interactions"], rejected)
    if job.schema.interactions and not sum(shard.positives for shard in shards):
        raise no_positive_pairs(job.schema.interactions)
    if not job.schema.items.popularity:
        pieces.join_clicks(job, num_items)
    pieces.join_counts(job, both)
    few_values = pieces.join_few_values(shards)
    first_queries = np.cumsum([0, *(shard.queries for shard in shards)])
    if first_queries[-1] >= 2**31:
        raise CommandError(f"the log has {first_queries[-1]:,} queries, expected below {2**31:,}; split the log")
    starts = {table: zip(tables[table], first_rows[table].tolist(), strict=False) for table in tables}
    features = run_tasks(spark, lambda work: pieces.write_piece(job, *work), [*starts["items"], *starts["users"]])
    written = run_tasks(
        spark,
        lambda work: pieces.write_shard(job, *work, few_values),
        list(enumerate(first_queries[:-1].tolist())),
    )
    events = pieces.join_tables(job, both, _sorted_events(spark, job))
    if job.schema.interactions and job.schema.interactions.held_out:
        pieces.join_held_out(job, first_queries)
    shutil.rmtree(job.work)
    sums = {name: sum(counts[name] for counts, _ in written) for name in written[0][0]}
    held_out = sum(held for _, held in written)
    counts = Counts(**sums, held_out=held_out, users=num_users, items=num_items, events=events, rejected=0)
    return counts, Features(features[0], features[len(tables["items"])])


def _read_table(spark: Any, job: Job, table: str, files: Sequence[Path], rejected: Rejects) -> tuple[Job, list[Piece]]:
    """Reads items or users. Returns the job, which now knows whether their ids are text, and the pieces."""
    found: list[Path] = []
    if files:
        column = job.schema.items.id if table == "items" else job.schema.users.id  # type: ignore[union-attr]
        counts = run_tasks(
            spark, lambda path: count_ids([Path(path)], column), [os.path.abspath(path) for path in files]
        )
        strange, total = (sum(count) for count in zip(*counts, strict=True))
        if are_text((strange, total)):
            job = dataclasses.replace(job, text_ids=job.text_ids | {table})
        encoded, by_id = job.work / "encoded" / table, job.work / "by_id" / table
        _encoded(spark, job, table, files).write.parquet(encoded.as_uri())
        reports = _reports(job, table, files, rejected)
        usable = sum(report.rows - report.rejects.num_rows for report in reports)
        count = max(spark.sparkContext.defaultParallelism, -(-usable // _PIECE_ROWS))
        frame = spark.read.parquet(encoded.as_uri()).repartitionByRange(count, "id")
        frame.write.parquet(by_id.as_uri())
        found = [path for path in _parquet_files(by_id) if pyarrow.parquet.read_metadata(path).num_rows]
        if table == "items" and not found:
            raise CommandError(f"{files[0]}: has no usable row, expected at least one item")
    # Without users there is a piece for the anonymous user.
    parts = [Piece(table, number, path) for number, path in enumerate(found or [None])]
    repeated = run_tasks(spark, functools.partial(pieces.count_piece, job), parts)
    if files:
        rejected.merge(_places(files, table, (row for rows in repeated for row in rows)))
        rejected.check(sum(report.rows for report in reports), complete=True)
    return job, parts


def _places(
    files: Sequence[Path], table: str, repeated: Iterable[tuple[int, str]]
) -> Iterator[tuple[Path, int, str, str]]:
    for number, value in sorted(repeated):
        file, row = pieces.place_of(number)
        yield files[file], row, f"{table[:-1]} id appears more than once", value


def _read_log(spark: Any, job: Job, files: Sequence[Path], rejected: Rejects) -> list[pieces.ShardCounts]:
    """Reads the interactions and spreads them over the shards."""
    from pyspark.sql.functions import expr

    folder, last_time = job.work / "log", 0
    if files:
        # The same shard as InteractionLog's: the first 64 bits of the hash.
        hashed = "CAST(conv(substring(md5(query), 1, 16), 16, 10) AS DECIMAL(20, 0))"
        frame = _encoded(spark, job, "interactions", files)
        frame = frame.withColumn("shard", expr(f"CAST({hashed} % {job.shards} AS INT)"))
        frame.repartition(job.shards, "shard").write.partitionBy("shard").parquet(folder.as_uri())
        reports = _reports(job, "interactions", files, rejected)
        rejected.check(sum(report.rows for report in reports), complete=True)
        last_time = max(report.last_time for report in reports)
    work = [(shard, _parquet_files(folder / f"shard={shard}")) for shard in range(job.shards)]
    return run_tasks(spark, lambda shard: pieces.count_shard(job, *shard, last_time), work)


def _encoded(spark: Any, job: Job, table: str, files: Sequence[Path]) -> Any:
    """Returns a DataFrame of the usable rows of files. A task reads and encodes a file."""
    from pyspark.sql.pandas.types import from_arrow_schema

    def encode(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            numbers, paths = batch["number"].to_pylist(), batch["path"].to_pylist()
            yield from pieces.encode_files(job, table, zip(numbers, paths, strict=True))

    numbered = [(number, os.path.abspath(path)) for number, path in enumerate(files)]
    rows = spark.createDataFrame(spark.sparkContext.parallelize(numbered, len(files)), "number int, path string")
    return rows.mapInArrow(encode, from_arrow_schema(pieces.encoded_schema(job, table)))


def _reports(job: Job, table: str, files: Sequence[Path], rejected: Rejects) -> list[pieces.FileReport]:
    """Reads what is to know of all files of a table, and hands over their rows that cannot be used."""
    reports = []
    rejected.begin(table, files)
    for number, path in enumerate(files):
        report = pieces.file_report(job, table, number)
        rejected.add(Source(path, 0, report.rejects), report.rejects)
        reports.append(dataclasses.replace(report, rejects=report.rejects.select(["row"])))
    return reports


def _sorted_events(spark: Any, job: Job) -> list[Path]:
    """Sorts the events of all shards by EVENT_ORDER. Returns Parquet files, the first rows first."""
    count = max(spark.sparkContext.defaultParallelism, job.shards)
    parts = [(job.shard(shard) / "files" / "events.parquet").as_uri() for shard in range(job.shards)]
    folder = job.work / "events"
    frame = spark.read.parquet(*parts).repartitionByRange(count, "user_row")
    frame.sortWithinPartitions(*EVENT_ORDER).write.parquet(folder.as_uri())
    return _parquet_files(folder)


def _parquet_files(folder: Path) -> list[Path]:
    """Returns the files of a DataFrame, in the order of its partitions."""
    return sorted(folder.glob("part-*.parquet"), key=lambda path: (int(path.name.split("-")[1]), path.name))
