"""The temporary database of `dpsr ingest`: DuckDB, which sorts, joins and counts rows within a given memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import duckdb
import numpy as np
import pyarrow as pa
from tqdm import tqdm

from dpsr_tf.data.column_files import ColumnFile, row_splits
from dpsr_tf.data.parallel import Workers

R = TypeVar("R")

# Rows of a result that are handled at a time, of numbers and of texts: enough for speed, few enough for memory.
_NUMBER_ROWS, TEXT_ROWS = 1 << 16, 1 << 12


class SortedColumns(NamedTuple):
    """Columns of a sorted result."""

    columns: list[ColumnFile]
    splits: np.ndarray  # int64 [groups + 1]: where the rows of each group begin


class Database:
    """Temporary tables in memory; rows that do not fit into it wait on disk.

    Every result that becomes part of a store is read in an order over all of its columns. So the same rows give the
    same bytes, in whatever order and on however many threads they came.
    """

    def __init__(self, folder: Path, workers: Workers, memory: int):
        """Opens an empty database.

        Args:
            folder: an existing directory for temporary files.
            workers: threads that encode results; DuckDB uses as many of its own.
            memory: bytes that DuckDB uses at most.
        """
        self.folder = folder
        self._workers = workers
        self._tables: set[str] = set()
        self._connection = duckdb.connect(
            config={
                "memory_limit": f"{memory}B",
                "threads": workers.threads,
                "temp_directory": str(folder / "duckdb"),
                "preserve_insertion_order": False,
                "python_enable_replacements": False,
                "autoinstall_known_extensions": False,
                "autoload_known_extensions": False,
            }
        )

    def close(self) -> None:
        """Drops everything."""
        self._connection.close()

    # Tables.

    def __contains__(self, table: str) -> bool:
        """Whether there is such a table."""
        return table in self._tables

    def insert(self, table: str, rows: pa.RecordBatch) -> None:
        """Adds rows to a table, which the first rows create."""
        self._connection.register("batch", rows)
        self._connection.execute(
            f"INSERT INTO {table} FROM batch" if table in self._tables else f"CREATE TABLE {table} AS FROM batch"
        )
        self._connection.unregister("batch")
        self._tables.add(table)

    def create(self, table: str, query: str) -> None:
        """Creates a table from the result of a query."""
        self._connection.execute(f"CREATE TABLE {table} AS {query}")
        self._tables.add(table)

    def save(self, query: str, path: Path) -> None:
        """Writes the result of a query as a Parquet file, in no order."""
        self._connection.execute(f"COPY ({query}) TO {_quoted(path)} (FORMAT parquet, COMPRESSION zstd)")

    def load(self, table: str, *paths: Path) -> None:
        """Creates a table from Parquet files."""
        self.create(table, f"FROM read_parquet([{', '.join(map(_quoted, paths))}])")

    def drop(self, table: str) -> None:
        """Removes a table."""
        self._connection.execute(f"DROP TABLE {table}")
        self._tables.remove(table)

    def rename(self, table: str, name: str) -> None:
        """Gives a table another name, which no table has."""
        self._connection.execute(f"ALTER TABLE {table} RENAME TO {name}")
        self._tables.remove(table)
        self._tables.add(name)

    def execute(self, statement: str) -> None:
        """Runs a statement that changes the rows of a table."""
        self._connection.execute(statement)

    # Results.

    def columns(self, table: str) -> list[str]:
        """Returns the names of a table's columns."""
        return [name for (name, *_) in self.rows(f"DESCRIBE {table}")]

    def count(self, table: str) -> int:
        """Returns the number of a table's rows."""
        return self.scalar(f"SELECT count(*) FROM {table}")

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        """Returns a small result as Python values."""
        return self._connection.sql(query).fetchall()

    def scalar(self, query: str) -> int:
        """Returns the single number of a result."""
        return int(self.rows(query)[0][0])

    def arrays(self, query: str) -> dict[str, np.ndarray]:
        """Returns a result as one array for each column."""
        return self._connection.sql(query).fetchnumpy()

    def table(self, query: str) -> pa.Table:
        """Returns a result that fits into memory."""
        return self._connection.sql(query).to_arrow_table()

    def batches(
        self, query: str, label: str, total: int | None = None, rows: int = _NUMBER_ROWS
    ) -> Iterator[pa.RecordBatch]:
        """Yields a result in batches of `rows` rows, under a progress bar with this label and total.

        Between two batches, other statements may run.
        """
        # While a result is read, its connection cannot run anything else.
        reading = self._connection.cursor()
        with tqdm(total=total, desc=f"{label:<16}", unit=" rows", unit_scale=True) as bar, reading:
            for batch in reading.sql(query).to_arrow_reader(rows):
                yield batch
                bar.update(batch.num_rows)

    def encoded_batches(
        self, query: str, label: str, total: int, encode: Callable[[pa.RecordBatch], R]
    ) -> Iterator[tuple[pa.RecordBatch, R]]:
        """Yields a result in batches, in order, each with the value that `encode` returns for it.

        `encode` runs on the worker threads.
        """
        batches = self.batches(query, label, total, TEXT_ROWS)
        return self._workers.map(lambda batch: (batch, encode(batch)), batches)

    def sorted_columns(
        self,
        columns: Sequence[str],
        source: str,
        order: Sequence[str],
        label: str,
        group: str | None = None,
        num_groups: int = 0,
    ) -> SortedColumns:
        """Reads columns of a sorted result into files.

        Args:
            columns: SQL expressions, which may end in " AS name".
            source: the rest of the query, from FROM on.
            order: columns that sort the result.
            label: label of the progress bar.
            group: a column with numbers from 0 to `num_groups` - 1, by which the result is sorted first.
            num_groups: the number of groups.

        Raises:
            duckdb.OutOfMemoryException: one thread cannot sort the rows within the given memory either.
        """
        try:
            return self._sorted_columns(columns, source, order, label, group, num_groups)
        except duckdb.OutOfMemoryException:
            # Each of DuckDB's threads needs memory of its own to sort. One needs least.
            self._connection.execute("SET threads = 1")
        try:
            return self._sorted_columns(columns, source, order, label, group, num_groups)
        finally:
            self._connection.execute(f"SET threads = {self._workers.threads}")

    def _sorted_columns(
        self, columns: Sequence[str], source: str, order: Sequence[str], label: str, group: str | None, num_groups: int
    ) -> SortedColumns:
        names = [column.rpartition(" AS ")[2] for column in columns]
        empty = self.arrays(f"SELECT {', '.join(columns)} {source} LIMIT 0")
        files = [ColumnFile(self.folder, empty[name].dtype) for name in names]
        counts = np.zeros(num_groups, np.int64)
        extra = [group] if group and group not in names else []
        query = f"SELECT {', '.join([*columns, *extra])} {source} ORDER BY {', '.join(order)}"
        for batch in self.batches(query, label):
            if group:
                groups, rows = np.unique(batch[group].to_numpy(), return_counts=True)
                counts[groups] += rows
            for file, name in zip(files, names, strict=True):
                file.append(batch[name].to_numpy())
        return SortedColumns(files, row_splits(counts))


def _quoted(path: Path) -> str:
    """Returns a path as a text of SQL."""
    return "'" + str(path).replace("'", "''") + "'"
